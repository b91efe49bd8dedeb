"""Registers data sets in COCO's format, and checks that one is there before training starts on it."""

import difflib
import functools
import json
import logging
import os
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mgd_det.errors import UserError

logger = logging.getLogger(__name__)

# Detectron2 reads this variable once too, when its own data sets are registered at import.
DATASETS_ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))

_NAMED_AT_MOST = 3  # missing files that a message lists
# What Detectron2's loader reads of each entry.
_REQUIRED_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
# What only some uses read: COCO's evaluator the first two, mask heads the third.
_OPTIONAL_KEYS = ("area", "iscrowd", "segmentation")


def register_coco_folder(
    name: str, json_file: Union[str, os.PathLike], image_root: Union[str, os.PathLike]
) -> List[str]:
    """Checks a data set in COCO's format and registers it with Detectron2.

    A second call with the same paths changes nothing.

    Args:
        name: the name for DATASETS.TRAIN and DATASETS.TEST.
        json_file: annotations in COCO's instances format; a local file.
        image_root: the folder that the json's file names start from.

    Returns:
        The class names in the order of Detectron2's class indices, that is by category id.

    Raises:
        UserError: a file is missing or broken, or ``name`` is taken by other paths.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        paths = (known.get("json_file"), known.get("image_root"))
        if [_absolute(path) for path in paths] != [_absolute(json_file), _absolute(image_root)]:
            raise UserError(
                f"The data set name {name!r} is taken: it is registered with json_file {paths[0]!r} and "
                f"image_root {paths[1]!r}. Choose another name."
            )
        return _check(name, *paths)
    classes = _check(name, json_file, image_root)
    # Detectron2 learns the classes when it loads the data, which is after the model is built.
    register_coco_instances(name, {"thing_classes": classes}, json_file, image_root)
    return list(classes)


def check_dataset(name: str, annotation_keys: Sequence[str] = ()) -> None:
    """Checks that the files of a registered data set are there and fit each other.

    The json is read whole (some 10 s for COCO's train2017), once in a process. Sets of other
    evaluators than COCO's (LVIS, panoptic) are only checked for the presence of their files; sets
    without a json and an image folder, and those that are not on a local disk, are not checked.

    Args:
        name: an entry of DATASETS.TRAIN or DATASETS.TEST.
        annotation_keys: what every annotation must have for the use at hand, of "area" and "iscrowd"
            (COCO's evaluator) and "segmentation" (masks).

    Raises:
        UserError: the name is unknown, or a file is missing or broken.
    """
    metadata = _metadata(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file or not image_root or "://" in str(json_file) + str(image_root):
        logger.debug(f"The files of {name} are not checked")
        return
    if metadata.get("evaluator_type") != "coco":
        _check_presence(name, json_file, image_root)
        return
    classes, registered = _check(name, json_file, image_root, annotation_keys), metadata.get("thing_classes")
    if registered is None:
        metadata.thing_classes = classes
    elif list(registered) != classes:
        raise UserError(
            f"The data set {name!r} is registered with the classes {_shortened(registered)}, but "
            f"{json_file!r} has {_shortened(classes)}. Register it anew, or make its json again."
        )


def dataset_classes(name: str) -> Optional[List[str]]:
    """Returns the class names that are known of a registered data set without loading it, or None.

    Raises:
        UserError: the name is unknown.
    """
    classes = _metadata(name).get("thing_classes")
    return None if classes is None else list(classes)


def _metadata(name: str):
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"There is no data set named {name!r}.{hint} Register one of your own with "
            "mgd_det.data.register_coco_folder(name, json_file, image_root)."
        )
    return MetadataCatalog.get(name)


def _absolute(path: Union[str, os.PathLike, None]) -> Optional[str]:
    return None if path is None else os.path.abspath(path)


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} ({_first_few(names)})"


def _first_few(names: List[str]) -> str:
    return ", ".join(names[:_NAMED_AT_MOST]) + (", ..." if len(names) > _NAMED_AT_MOST else "")


def _how_to_get(name: str, path: str) -> str:
    if name.startswith("fashion_scenes_"):
        size = name[len("fashion_scenes_") :].rsplit("_", 1)[0]
        todo = f"Make it: python tools/prepare_fashion_scenes.py {size}"
    else:
        todo = "Correct the path, or put the file there."
    root = os.path.abspath(DATASETS_ROOT)
    if os.path.abspath(path).startswith(root + os.sep):
        todo += (
            f" (Its place is under the data set folder {root!r}, which the environment variable "
            "DETECTRON2_DATASETS names.)"
        )
    return todo


def _check_presence(name: str, json_file: str, image_root: str) -> None:
    if not os.path.isfile(json_file):
        raise UserError(f"Data set {name!r}: no file {json_file!r}. {_how_to_get(name, json_file)}")
    if not os.path.isdir(image_root):
        raise UserError(f"Data set {name!r}: no image folder {image_root!r}. {_how_to_get(name, image_root)}")


def _check(name: str, json_file: str, image_root: str, annotation_keys: Sequence[str] = ()) -> List[str]:
    """Checks the files and returns the class names."""
    _check_presence(name, json_file, image_root)
    state = os.stat(json_file)
    classes, file_names, lacking = _read_json(json_file, state.st_mtime_ns, state.st_size)

    for key in annotation_keys:
        if dict(lacking).get(key) is not None:
            uses = "mask heads learn from it" if key == "segmentation" else "COCO's evaluator reads it"
            raise UserError(
                f"Data set {name!r}: annotation {dict(lacking)[key]} of {json_file!r} has no {key!r}, and {uses}. "
                "Add it to every annotation, or "
                + ("set MODEL.MASK_ON to False." if key == "segmentation" else "leave the set out of DATASETS.TEST.")
            )
    missing = _missing_images(image_root, file_names)
    if missing:
        raise UserError(
            f"Data set {name!r}: {len(missing)} of the {len(file_names)} images that {json_file!r} names are "
            f"not in {image_root!r}: {_first_few(missing)}. "
            f"{_how_to_get(name, image_root)}"
        )
    return list(classes)


# Training checks a set more than once, and COCO's json takes seconds: what is kept of one is small. The
# time and size are in the key, so that a file that has changed is read again.
@functools.lru_cache(maxsize=16)
def _read_json(json_file: str, mtime_ns: int, size: int) -> Tuple[Tuple[str, ...], Tuple[str, ...], Tuple]:
    """Returns class names by category id, file names of the images, and (optional key, id of one without it)."""
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {json_file!r} as json: {error}. Make or download it again.") from error
    if not isinstance(content, dict):
        raise _not_coco(json_file, f"it holds a {type(content).__name__}, not an object")
    if os.path.basename(json_file).startswith("image_info"):
        content.setdefault("annotations", [])  # COCO's test images, whose annotations are not public
    for part, keys in _REQUIRED_KEYS.items():
        _check_entries(json_file, content, part, keys)

    for part in ("images", "categories"):
        if not content[part]:
            raise _not_coco(json_file, f"its {part!r} is empty")
    known = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        if annotation["category_id"] not in known:
            reason = f"category_id {annotation['category_id']}, which is not in 'categories'"
            raise _not_coco(json_file, f"annotation {annotation['id']} has {reason}")
    # COCO's own minival files repeat a few ids, and Detectron2 lets them.
    ids = {annotation["id"] for annotation in content["annotations"]}
    if len(ids) < len(content["annotations"]) and "minival" not in json_file:
        raise _not_coco(json_file, f"its {len(content['annotations'])} annotations have {len(ids)} ids")
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return (
        tuple(category["name"] for category in categories),
        tuple(image["file_name"] for image in content["images"]),
        tuple((key, next((a["id"] for a in content["annotations"] if key not in a), None)) for key in _OPTIONAL_KEYS),
    )


def _check_entries(json_file: str, content: Dict[str, Any], part: str, keys: Iterable[str]) -> None:
    entries = content.get(part)
    if not isinstance(entries, list):
        raise _not_coco(json_file, f"it has no list {part!r}")
    for index, entry in enumerate(entries):
        absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if absent:
            raise _not_coco(json_file, f"entry {index} of {part!r} has no {', '.join(map(repr, absent))}")


def _not_coco(json_file: str, reason: str) -> UserError:
    return UserError(
        f"{json_file!r} is not in COCO's instances format: {reason}. See "
        "https://cocodataset.org/#format-data, or export it again as COCO instances."
    )


def _missing_images(image_root: str, file_names: Iterable[str]) -> List[str]:
    # One listing of each folder instead of one look at each of COCO's 118 000 files.
    there: Dict[str, Set[str]] = {}
    missing: List[str] = []
    for file_name in file_names:
        folder, base = os.path.split(file_name)
        if folder not in there:
            try:
                there[folder] = set(os.listdir(os.path.join(image_root, folder)))
            except (FileNotFoundError, NotADirectoryError):
                there[folder] = set()
        if base not in there[folder]:
            missing.append(file_name)
    return missing
