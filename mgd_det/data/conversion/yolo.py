"""Read a data set in YOLO's format: data.yaml, images/ and labels/*.txt."""

import math
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml

from mgd_det.data.conversion.coco_split import IMAGE_SUFFIXES, BadLines, CocoSplit
from mgd_det.errors import UserError, first_line

_SPLITS = ("train", "val", "test")
_TOLERANCE = 1e-3  # of coordinates outside 0 to 1, which rounding makes


def read_yolo(data_yaml: Path) -> Tuple[List[str], List[CocoSplit]]:
    """Read the splits of a data.yaml.

    A line of a label file is "class x y width height" (the box's centre) or "class x y x y x y..." (a polygon), in
    fractions of the image. An image without a label file has no objects. Label files stand where the images do, with
    the last folder "images" of the path called "labels".

    Args:
        data_yaml: with "names", "train", "val", "test" and, if the paths are relative to another folder, "path".

    Returns:
        The class names, and the splits that data.yaml names.

    Raises:
        UserError: data.yaml cannot be used, an image or label file cannot be read, or a line is wrong.
    """
    content = _read_yaml(data_yaml)
    if content.get("kpt_shape"):
        raise UserError(
            f"{data_yaml} has kpt_shape: labels with keypoints cannot be converted, only boxes and polygons"
        )
    classes = _classes(data_yaml, content)
    root = data_yaml.parent
    if content.get("path"):
        beside = root / str(content["path"])
        root = beside if beside.is_dir() else Path(str(content["path"]))
        if not root.is_dir():
            root = data_yaml.parent  # written on another machine
    bad, splits = BadLines(), []
    for name in _SPLITS:
        if content.get(name):
            splits.append(_read_split(name, _images(data_yaml, root, name, content[name]), len(classes), bad))
    if not splits:
        raise UserError(f"{data_yaml} names no images: it needs train, val or test")
    bad.refuse()
    return classes, splits


def _read_yaml(path: Path) -> Dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a YAML mapping: it needs names, train and val")
    return content


def _classes(path: Path, content: Dict[str, Any]) -> List[str]:
    names = content.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise UserError(f"{path}: the keys of names are {list(names)!s:.80}; number the classes 0, 1, 2...")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: names is {names!r:.80}; list the classes there")
    number = content.get("nc", len(names))
    if number != len(names):
        raise UserError(f"{path}: nc is {number}, but names has {len(names)} classes; correct one of them")
    return [str(name) for name in names]


def _images(data_yaml: Path, root: Path, split: str, value: Any) -> List[Path]:
    """Return the images of a split: of a folder, a list of folders, or a text file with a path in each line."""
    images: List[Path] = []
    for entry in value if isinstance(value, list) else [value]:
        path = root / str(entry)
        if not path.exists() and str(entry).startswith("../"):  # as some exports have it, beside data.yaml or not
            path = root / str(entry)[3:]
        if path.is_dir():
            images += sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file() and path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            images += [path.parent / line.strip() for line in lines if line.strip()]
        else:
            raise UserError(f"{data_yaml}: {split} is {entry!r}, but {path} is no folder and no .txt: correct the path")
    if not images:
        raise UserError(f"{data_yaml}: {split} is {value!r}, where there is no image ({', '.join(IMAGE_SUFFIXES)})")
    return images


def _read_split(name: str, images: List[Path], number_of_classes: int, bad: BadLines) -> CocoSplit:
    root = Path(os.path.commonpath([os.path.abspath(image.parent) for image in images]))
    split = CocoSplit(name, root)
    for image in images:
        size = split.add_image(Path(os.path.abspath(image)), bad)
        labels = _label_file(image)
        if size is None or not labels.is_file():
            continue
        try:
            lines = labels.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as e:
            bad.add(labels, 0, f"cannot be read ({first_line(e)})")
            continue
        for number, line in enumerate(lines, start=1):
            if line.strip():
                problem = _add_line(split, line, size, number_of_classes)
                if problem:
                    bad.add(labels, number, f"{problem}: {line.strip()!r:.80}")
    return split


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _add_line(split: CocoSplit, line: str, size: Tuple[int, int], number_of_classes: int) -> Optional[str]:
    """Add the object of a line, or return what is wrong with it."""
    try:
        label, *values = (float(word) for word in line.split())
    except ValueError:
        return "not only numbers"
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        return f"{len(values)} numbers after the class; a box has 4, a polygon at least 6 and an even number"
    if label not in range(number_of_classes):
        return f"class {label:g}, but there are {number_of_classes}, from 0"
    if not all(math.isfinite(v) and -_TOLERANCE <= v <= 1 + _TOLERANCE for v in values):
        return "a number that is not from 0 to 1"
    height, width = size
    if len(values) == 4:
        x, y, w, h = values
        if w <= 0 or h <= 0:
            return "a box without width or height"
        box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        split.add_object(int(label), box)
        return None
    polygon = [min(max(v, 0.0), 1.0) * side for v, side in zip(values, (width, height) * (len(values) // 2))]
    xs, ys = polygon[::2], polygon[1::2]
    if max(xs) <= min(xs) or max(ys) <= min(ys):
        return "a polygon without width or height"
    split.add_object(int(label), (min(xs), min(ys), max(xs), max(ys)), polygon)
    return None
