"""Small data sets in COCO's format, made on the spot and broken at will."""

import json
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

SIZE = (48, 64)  # height, width
CATEGORIES = {91: "ship", 7: "plane", 20: "car"}  # names by id, in no order


def annotation(number, **changes):
    """An annotation of image 1: a rectangle with its polygon."""
    entry = {"id": number, "image_id": 1, "category_id": 7, "bbox": [8, 10, 20, 12], "area": 240, "iscrowd": 0}
    entry["segmentation"] = [[8, 10, 28, 10, 28, 22, 8, 22]]
    return {**entry, **changes}


def content(images=6, **changes):
    """A json's content: annotation i of image i, for each but the last image, which has none."""
    parts = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in _ids(images)],
        "annotations": [annotation(i, image_id=i, category_id=[7, 20, 91][i % 3]) for i in _ids(images - 1)],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }
    return {**parts, **changes}


def write(root: Path, parts: dict, name="instances.json"):
    """Writes json and images (noise of the sizes in the json); returns their paths."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for image in parts["images"]:
        path = root / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (root / name).write_text(json.dumps(parts))
    return root / name, root / "images"


def rle(mask):
    """A mask (H, W) as COCO's compressed RLE."""
    encoded = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def plain_rle(mask):
    """A mask (H, W) as the list of its runs."""
    pixels = mask.ravel(order="F").astype(int)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], pixels])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], changes, [len(pixels)]])).tolist()}


def truncate(path: Path) -> None:
    """Cuts the second half of an image off."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def forget(*beginnings: str) -> None:
    """Takes data sets whose names begin so out of Detectron2's catalogs."""
    for name in [n for n in DatasetCatalog.list() if n.startswith(beginnings)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _ids(number):
    return range(1, number + 1)
