"""Detectron2's dataset mapper, with an answer to images that cannot be read."""

import logging
import os
from typing import Any, Dict, List, Optional

from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from iopath.common.file_io import file_lock

from mgd_det.data.coco.image_check import reading_fault
from mgd_det.errors import UserError

logger = logging.getLogger(__name__)

_IN_A_ROW = 20  # images that cannot be read: a disk is gone


class BrokenImageError(UserError):
    """An image that cannot be read or used, met in training or evaluation."""

    def __init__(self, message: str) -> None:
        # torch raises the error of a loader's worker again as type(error)(text), with the worker's traceback before
        # the message: what counts is after the name of this class.
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].rstrip())


class CheckedMapper(DatasetMapper):
    """Detectron2's DatasetMapper that says which image is broken, or skips it.

    An image is broken where it cannot be read or has another size than the json says. In evaluation it is always an
    error: skipped, its objects would count as missed.
    """

    @configurable
    def __init__(self, is_train: bool, *, broken_input: str = "refuse", skipped_list: str = "", **kwargs: Any) -> None:
        """
        Args:
            is_train: as in DatasetMapper, which the other arguments are for, too.
            broken_input: in training, "refuse" (a BrokenImageError) or "skip" (None is returned, for which the
                loader takes another image).
            skipped_list: a file that names the skipped images, one a line; what the data loader's workers and the
                ranks share, so that each image is logged once. "": each process logs its own.
        """
        super().__init__(is_train, **kwargs)
        self._skips = is_train and broken_input == "skip"
        self._skipped = SkippedImages(skipped_list)
        self._in_a_row = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> Dict[str, Any]:
        arguments = super().from_config(cfg, is_train)
        arguments["broken_input"] = cfg.DATASETS.BROKEN_INPUT
        arguments["skipped_list"] = skipped_list(cfg)
        return arguments

    def __call__(self, dataset_dict: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """As DatasetMapper's; None for a broken image that is skipped. Raises BrokenImageError."""
        try:
            mapped = super().__call__(dataset_dict)
        except Exception:
            # Read once more, so that only what is wrong with the image is said to be.
            fault = reading_fault(dataset_dict) if "file_name" in dataset_dict else None
            if fault is None:
                raise
        else:
            self._in_a_row = 0
            return mapped
        message = fault[1]
        if not self._skips:
            raise BrokenImageError(
                f"{message}. tools/check_dataset.py lists all broken images; DATASETS.BROKEN_INPUT skip (of "
                "tools/train_net.py) trains and evaluates without them."
            )
        self._in_a_row += 1
        if self._in_a_row == _IN_A_ROW:
            raise BrokenImageError(f"{_IN_A_ROW} images in a row cannot be read: is their disk still there? {message}")
        count = self._skipped.add(dataset_dict["file_name"])
        if count:
            logger.warning(f"Skipped: {message}. Images skipped so far: {count}")
        return None


class SkippedImages:
    """A list of images that processes share by a file."""

    def __init__(self, path: str = "") -> None:
        """
        Args:
            path: the file; "" for a list of this process.
        """
        self.path = path
        self._known: Dict[str, None] = {}

    def add(self, file_name: str) -> int:
        """Adds an image. Returns how many there are now, 0 where it was there before."""
        if file_name in self._known:
            return 0
        if not self.path:
            self._known[file_name] = None
            return len(self._known)
        with file_lock(self.path):
            self._known = dict.fromkeys(self.read())
            if file_name in self._known:
                return 0
            self._known[file_name] = None
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(file_name + "\n")
        return len(self._known)

    def read(self) -> List[str]:
        """The images, in the order in which they were met."""
        if not self.path or not os.path.exists(self.path):
            return list(self._known)
        with open(self.path, encoding="utf-8") as file:
            return file.read().splitlines()


def skipped_list(cfg: CfgNode) -> str:
    """The file that names the images that a training skipped."""
    return os.path.join(cfg.OUTPUT_DIR, "datasets", "skipped_images.txt")
