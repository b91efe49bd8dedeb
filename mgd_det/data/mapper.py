"""Detectron2's dataset mapper, which also handles images that cannot be read."""

import logging
import os
from typing import Any, Dict, List, Optional

from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from iopath.common.file_io import file_lock

from mgd_det.data.coco.image_check import mode_problem, reading_problem
from mgd_det.errors import UserError

logger = logging.getLogger(__name__)

_IN_A_ROW = 20  # unreadable images that mean a missing disk


class BrokenImageError(UserError):
    """An image that cannot be read or used in training or evaluation."""

    def __init__(self, message: str) -> None:
        # torch raises the error of a loader's worker again as type(error)(text), with the worker's traceback before
        # the message, which follows the name of this class.
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].rstrip())


class CheckedMapper(DatasetMapper):
    """Detectron2's DatasetMapper that names a broken image, or skips it.

    An image is broken if it cannot be read, has another size than the json says, or has more than 8 bits per channel.
    In evaluation it is always an error: if it were skipped, its objects would count as missed.
    """

    @configurable
    def __init__(self, is_train: bool, *, broken_input: str = "refuse", skipped_list: str = "", **kwargs: Any) -> None:
        """
        Args:
            is_train: as in DatasetMapper.
            broken_input: in training, "refuse" (raise a BrokenImageError) or "skip" (return None, for which the loader
                takes another image).
            skipped_list: a file with the names of the skipped images, one per line. The data loader's workers and the
                ranks share it, so that each image is logged once. "": each process logs its own.
            kwargs: of DatasetMapper.
        """
        super().__init__(is_train, **kwargs)
        self._skips = is_train and broken_input == "skip"
        self._skipped = SkippedImages(skipped_list)
        self._in_a_row = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> Dict[str, Any]:
        if not is_train and cfg.MODEL.KEYPOINT_ON:
            # It would read the keypoints of DATASETS.TRAIN, which an evaluation neither needs nor may have.
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.KEYPOINT_ON = False
        arguments = super().from_config(cfg, is_train)
        arguments["broken_input"] = cfg.DATASETS.BROKEN_INPUT
        arguments["skipped_list"] = skipped_list(cfg)
        return arguments

    def __call__(self, dataset_dict: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """Map a dataset dict as DatasetMapper does.

        Returns:
            The model's input; None for a broken image that is skipped.

        Raises:
            BrokenImageError: the image is broken and must not be skipped, or too many are broken in a row.
        """
        try:
            mapped = super().__call__(dataset_dict)
            problem = mode_problem(dataset_dict["file_name"])
        except Exception:
            # Read the image again: only its own problems are reported as such.
            problem = reading_problem(dataset_dict) if "file_name" in dataset_dict else None
            if problem is None:
                raise
        if problem is None:
            self._in_a_row = 0
            return mapped
        if not self._skips:
            raise BrokenImageError(
                f"{problem.message}. tools/check_dataset.py lists all broken images; DATASETS.BROKEN_INPUT skip (of "
                "tools/train_net.py) trains and evaluates without them."
            )
        self._in_a_row += 1
        if self._in_a_row == _IN_A_ROW:
            raise BrokenImageError(f"{_IN_A_ROW} images in a row cannot be read; check their disk. {problem.message}")
        count = self._skipped.add(dataset_dict["file_name"])
        if count:
            logger.warning(f"Skipped: {problem.message}. Images skipped so far: {count}")
        return None


class SkippedImages:
    """A list of images that processes share through a file."""

    def __init__(self, path: str = "") -> None:
        """
        Args:
            path: the file; "" for a list of this process.
        """
        self.path = path
        self._known: Dict[str, None] = {}

    def add(self, file_name: str) -> int:
        """Add an image. Return the number of images now, or 0 if it was in the list before."""
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
        """Return the images in the order in which they were added."""
        if not self.path or not os.path.exists(self.path):
            return list(self._known)
        with open(self.path, encoding="utf-8") as file:
            return file.read().splitlines()


def skipped_list(cfg: CfgNode) -> str:
    """Return the path of the file with the images that training skipped."""
    return os.path.join(cfg.OUTPUT_DIR, "datasets", "skipped_images.txt")
