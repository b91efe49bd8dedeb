"""The categories that a detector has learned, beside its weights: its outputs are only indices of classes."""

import json
import os
from typing import Any, Dict, List, Optional, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from mgd_det.data.coco.register import classes_without_loading, read_report
from mgd_det.errors import UserError

FILE = "categories.json"

# {"id": 7, "name": "plane"} of each class, in the order of the class indices.
Categories = List[Dict[str, Any]]


def categories_of_json(json_file: str) -> Categories:
    """Return the categories of a json in COCO's format, in the order of Detectron2's class indices."""
    report = read_report(json_file)
    return [{"id": number, "name": name} for number, name in zip(report.category_ids, report.classes)]


def categories_of_set(name: str) -> Categories:
    """Return the categories of a data set as far as they are known without loading it; otherwise none.

    Args:
        name: of a data set, which need not be registered. One that has no ids for its classes gets 1, 2...
    """
    if name not in DatasetCatalog:
        return []
    metadata = MetadataCatalog.get(name)
    ids, names = metadata.get("thing_dataset_id_to_contiguous_id"), metadata.get("thing_classes")
    if ids and names:
        return [{"id": number, "name": names[index]} for number, index in sorted(ids.items(), key=lambda item: item[1])]
    json_file = metadata.get("original_json_file") or metadata.get("json_file")
    if metadata.get("evaluator_type") == "coco" and json_file and os.path.isfile(json_file):
        return categories_of_json(json_file)
    return numbered_categories(classes_without_loading(name) or ())


def numbered_categories(names: Sequence[str]) -> Categories:
    """Return categories with the ids 1, 2..."""
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]


def unknown_categories(number: int) -> Categories:
    """Return the categories of a detector whose classes nothing tells: "class 1", "class 2"..."""
    return numbered_categories([f"class {i}" for i in range(1, number + 1)])


def save_categories(datasets: Sequence[str], folder: str) -> None:
    """Write the categories of a run's first training set to categories.json; nothing if they are not known.

    Args:
        datasets: DATASETS.TRAIN.
        folder: OUTPUT_DIR.
    """
    for name in datasets[:1]:
        categories = categories_of_set(name)
        if categories:
            with PathManager.open(os.path.join(folder, FILE), "w") as file:
                json.dump(categories, file)


def load_categories(folder: str) -> Optional[Categories]:
    """Return what :func:`save_categories` wrote to a folder, or None.

    Raises:
        UserError: the file is broken.
    """
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return [{"id": entry["id"], "name": str(entry["name"])} for entry in json.load(file)]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path} cannot be read ({e}): delete it, or write a list of id and name there") from e
