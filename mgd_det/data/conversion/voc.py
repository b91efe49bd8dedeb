"""Read a data set in Pascal VOC's format: JPEGImages/, Annotations/*.xml and ImageSets/Main/*.txt."""

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from mgd_det.data.conversion.coco_split import IMAGE_SUFFIXES, BadLines, CocoSplit
from mgd_det.errors import UserError, first_line

_SPLITS = ("train", "val", "test", "trainval")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    name: str
    box: Tuple[float, ...]  # x0, y0, x1, y1
    difficult: bool
    line: int  # in the xml


def read_voc(root: Path) -> Tuple[List[str], List[CocoSplit]]:
    """Read the splits of ImageSets/Main; without that folder, all annotated images as one split "all".

    VOC counts pixels from 1 and includes the last one, so a box begins at xmin - 1 and ends at xmax. Objects marked as
    difficult become crowds, which training leaves out and evaluation ignores, as VOC's own does. The classes are in
    alphabetical order, as VOC's own are.

    Args:
        root: the folder with JPEGImages and Annotations.

    Returns:
        The class names, and the splits.

    Raises:
        UserError: a folder, an image or an xml is missing, or an xml is wrong.
    """
    for folder in ("JPEGImages", "Annotations"):
        if not (root / folder).is_dir():
            raise UserError(f"{root} has no folder {folder}, which a data set in Pascal VOC's format has")
    images = {file.stem: file for file in sorted((root / "JPEGImages").iterdir()) if _is_image(file)}
    bad = BadLines()
    found: Dict[str, List[Tuple[Path, List[_Object]]]] = {}
    for name, stems in _splits(root, bad).items():
        found[name] = []
        for stem in stems:
            xml = root / "Annotations" / f"{stem}.xml"
            if stem not in images:
                bad.add(root / "JPEGImages" / stem, 0, "there is no image of this name")
            elif not xml.is_file():
                bad.add(xml, 0, "there is no such file")
            else:
                found[name].append((images[stem], _read_xml(xml, bad)))
    classes = sorted({thing.name for entries in found.values() for _, things in entries for thing in things})
    splits = [_split(name, root, entries, classes, bad) for name, entries in found.items()]
    bad.refuse()
    if not classes:
        raise UserError(f"{root / 'Annotations'} has no object")
    return classes, splits


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _splits(root: Path, bad: BadLines) -> Dict[str, List[str]]:
    """Return the names of the images of each split, without suffix."""
    lists = root / "ImageSets" / "Main"
    files = [lists / f"{name}.txt" for name in _SPLITS if (lists / f"{name}.txt").is_file()]
    if not files:
        return {"all": sorted(xml.stem for xml in (root / "Annotations").glob("*.xml"))}
    splits: Dict[str, List[str]] = {}
    for file in files:
        stems = splits[file.stem] = []
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
            stem, words = line.strip(), line.split()
            # A list of one class has a word more in each line; a name may have spaces.
            if len(words) > 1 and not (root / "Annotations" / f"{stem}.xml").is_file():
                bad.add(file, number, f"{len(words)} words instead of one name: {stem!r:.80}")
                stem = words[0]
            stems += [stem] if stem else []
    return splits


def _read_xml(path: Path, bad: BadLines) -> List[_Object]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as e:
        bad.add(path, e.position[0], f"is no xml ({first_line(e)})")
        return []
    except (OSError, ValueError) as e:
        bad.add(path, 0, f"cannot be read ({first_line(e)})")
        return []
    # The parser keeps no line numbers: the nth <object> of the text is the nth of the tree.
    lines = [text.count("\n", 0, match.start()) + 1 for match in re.finditer(r"<object\b", text)]
    objects = []
    for thing, line in zip(tree.findall("object"), lines):
        problem, found = _read_object(thing, line)
        if found is None:
            bad.add(path, line, problem)
        else:
            objects.append(found)
    return objects


def _read_object(thing: ElementTree.Element, line: int) -> Tuple[str, Optional[_Object]]:
    """Return what is wrong with an <object>, or the object."""
    name = (thing.findtext("name") or "").strip()
    if not name:
        return "an object without a name", None
    texts = {corner: thing.findtext(f"bndbox/{corner}") for corner in _CORNERS}
    try:
        corners = [float(texts[corner] or "") for corner in _CORNERS]
    except ValueError:
        return f"the bndbox of {name!r} is {texts}; it needs four numbers", None
    xmin, ymin, xmax, ymax = corners
    if not all(map(math.isfinite, corners)) or xmax < xmin or ymax < ymin:
        return f"the bndbox of {name!r} is {texts}; xmax and ymax must not be below xmin and ymin", None
    difficult = (thing.findtext("difficult") or "0").strip() == "1"
    return "", _Object(name, (xmin - 1, ymin - 1, xmax, ymax), difficult, line)


def _split(
    name: str, root: Path, entries: List[Tuple[Path, List[_Object]]], classes: List[str], bad: BadLines
) -> CocoSplit:
    split = CocoSplit(name, root / "JPEGImages")
    for image, things in entries:
        size = split.add_image(image, bad)
        for thing in things if size else []:
            height, width = size or (0, 0)
            x0, y0, x1, y1 = thing.box
            if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
                xml = root / "Annotations" / f"{image.stem}.xml"
                bad.add(xml, thing.line, f"the box of {thing.name!r} is outside its image of {width} x {height}")
                continue
            split.add_object(classes.index(thing.name), thing.box, iscrowd=thing.difficult)
    return split
