"""Let Detectron2 and COCO's evaluator read whole numbers where a json has 64.0 or true.

Both take the sizes, ids and flags of a json as they are. A mask of size [64.0, 64.0] passes training and fails in the
evaluation; an id 1.0 appears in the results.
"""

import functools
import json
import os
import tempfile
from multiprocessing.util import get_temp_dir
from typing import Any, Dict, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import coco as detectron2_coco

from mgd_det.errors import UserError

_WHOLE_NUMBERS: Dict[str, Tuple[str, ...]] = {
    "categories": ("id",),
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "iscrowd", "num_keypoints"),
}
_MAY_BE_BOOLEAN = ("iscrowd", "num_keypoints", "size", "counts")


def with_whole_numbers(content: Any) -> Any:
    """Return a json's content with int instead of float for whole numbers, and instead of bool for flags.

    ``content`` may be broken and is not changed. It is returned itself if nothing has to be converted.
    """
    if not isinstance(content, dict):
        return content
    changes = {}
    for part, keys in _WHOLE_NUMBERS.items():
        entries = content.get(part)
        if isinstance(entries, list):
            converted = [_converted(entry, keys) if isinstance(entry, dict) else entry for entry in entries]
            if _differ(converted, entries):
                changes[part] = converted
    return {**content, **changes} if changes else content


def read_as_whole_numbers(name: str, json_file: str, convert: bool) -> None:
    """Set the file that a registered data set and its evaluator read.

    Args:
        name: of the data set.
        json_file: the json that the user gave; metadata "original_json_file" keeps it.
        convert: whether to read a copy with whole numbers, which is deleted when the process ends.

    Raises:
        UserError: the copy cannot be written.
    """
    metadata = MetadataCatalog.get(name)
    state = os.stat(json_file)
    file_read = _copy_of(json_file, state.st_mtime_ns, state.st_size) if convert else json_file
    if os.fspath(metadata.json_file) == file_read:
        return
    del metadata.json_file  # Detectron2 refuses another value for an attribute that is set
    metadata.set(json_file=file_read, original_json_file=json_file)
    # A loader of the user's own keeps its way of reading.
    if DatasetCatalog[name].__module__ == detectron2_coco.__name__:
        DatasetCatalog[name] = lambda: detectron2_coco.load_coco_json(metadata.json_file, metadata.image_root, name)


# Time and size are in the key, so that a file that has changed is read again.
@functools.lru_cache(maxsize=8)
def _copy_of(json_file: str, mtime_ns: int, size: int) -> str:
    with open(json_file, encoding="utf-8") as file:
        content = with_whole_numbers(json.load(file))
    try:
        # Detectron2 accepts repeated ids in files whose path has this word.
        folder = tempfile.mkdtemp(prefix="minival" if "minival" in json_file else "coco", dir=get_temp_dir())
        copy = os.path.join(folder, os.path.basename(json_file))
        with open(copy, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except (OSError, RecursionError) as error:
        raise UserError(
            f"{json_file!r} has numbers such as 64.0 instead of 64, and a copy with whole numbers cannot be written to "
            f"the temporary folder (TMPDIR): {error}. Make room there, or export the json again with whole numbers."
        ) from error
    return copy


def _converted(entry: Dict[str, Any], keys: Tuple[str, ...]) -> Dict[str, Any]:
    changes: Dict[str, Any] = {}
    for key in keys:
        value = entry.get(key)
        whole = _whole(key, value)
        if whole is not value:
            changes[key] = whole
    rle = entry.get("segmentation")
    if isinstance(rle, dict):
        for key in ("size", "counts"):
            numbers = rle.get(key)
            if isinstance(numbers, list):
                converted = [_whole(key, number) for number in numbers]
                if _differ(converted, numbers):
                    changes["segmentation"] = {**changes.get("segmentation", rle), key: converted}
    return {**entry, **changes} if changes else entry


def _whole(key: str, value: Any) -> Any:
    if type(value) is float and value.is_integer() or type(value) is bool and key in _MAY_BE_BOOLEAN:
        return int(value)
    return value


def _differ(converted: list, values: list) -> bool:
    return any(new is not old for new, old in zip(converted, values))
