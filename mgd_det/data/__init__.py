"""Data sets in COCO's format, FashionScenes, which this project generates, and the loader that trains on them.

Importing this package registers ``fashion_scenes_{tiny,small,large}_{train,val}`` with Detectron2, in the folder that
the environment variable DETECTRON2_DATASETS names ("datasets" by default). ``tools/prepare_fashion_scenes.py``
generates their files.
"""

import os

from detectron2.data.datasets import register_coco_instances

from mgd_det.data.coco.clean import without_broken_entries
from mgd_det.data.coco.register import DATASETS_ROOT, check_dataset, dataset_classes, register_coco_folder
from mgd_det.data.fashion_scenes import (
    CLASS_NAMES,
    SCENE_SPECS,
    SPLITS,
    FashionPhotos,
    SceneSpec,
    find_photo_folder,
    read_photos,
    write_fashion_scenes,
)
from mgd_det.data.mapper import BrokenImageError, CheckedMapper
from mgd_det.data.resumable_loader import ResumableLoader, build_resumable_train_loader

__all__ = [
    "CLASS_NAMES",
    "DATASETS_ROOT",
    "SCENE_SPECS",
    "BrokenImageError",
    "CheckedMapper",
    "FashionPhotos",
    "ResumableLoader",
    "SceneSpec",
    "build_resumable_train_loader",
    "check_dataset",
    "dataset_classes",
    "find_photo_folder",
    "read_photos",
    "register_coco_folder",
    "without_broken_entries",
    "write_fashion_scenes",
]


def _register_fashion_scenes() -> None:
    # No file is read here, only when Detectron2 loads the set.
    for size in SCENE_SPECS:
        folder = os.path.join(DATASETS_ROOT, "fashion_scenes", size)
        for split in SPLITS:
            register_coco_instances(
                f"fashion_scenes_{size}_{split}",
                {"thing_classes": list(CLASS_NAMES)},
                os.path.join(folder, "annotations", f"instances_{split}.json"),
                os.path.join(folder, "images", split),
            )


_register_fashion_scenes()
