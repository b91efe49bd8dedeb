"""Data sets in COCO's format: register them, check them, and leave out what is broken."""

from mgd_det.data.coco.clean import without_broken_entries
from mgd_det.data.coco.register import DATASETS_ROOT, check_dataset, dataset_classes, register_coco_folder

__all__ = ["DATASETS_ROOT", "check_dataset", "dataset_classes", "register_coco_folder", "without_broken_entries"]
