"""A trained detector for images, from the files that a training leaves."""

import os
from typing import Any, List, Optional, Protocol, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from detectron2.structures import Instances

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.config import class_head, merge_config, without_distillation
from mgd_det.data.categories import Categories, categories_of_json, load_categories, numbered_categories
from mgd_det.data.coco.register import classes_without_loading
from mgd_det.errors import UserError
from mgd_det.files.student_files import STUDENT_CONFIG, STUDENT_WEIGHTS
from mgd_det.model_zoo import find_config_file
from mgd_det.modeling.teachers import trained_weights


class ImagePredictor(Protocol):
    """What :func:`load_predictor` returns.

    Attributes:
        categories: {"id": 7, "name": "plane"} of each class, in the order of the class indices.
    """

    categories: Categories

    def __call__(self, image: np.ndarray) -> Instances:
        """Find the objects of an image.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            On the CPU, in the image's own pixels: pred_boxes, scores, pred_classes, and pred_masks or pred_keypoints
            of detectors that have them.
        """


def load_predictor(path: str, opts: Sequence[str] = ()) -> ImagePredictor:
    """Load a trained detector.

    Args:
        path: a folder with model_final.pth and student.yaml or config.yaml, a yaml config whose MODEL.WEIGHTS are
            trained, or a name of a model zoo.
        opts: overrides of the config, KEY, VALUE...

    Raises:
        UserError: a file is missing, cannot be read, or is not a trained detector's.
    """
    if path.endswith(".onnx"):
        raise UserError(
            f"--model {path} is an exported model, which needs a reader of its own: give the folder of the training or "
            "its student.yaml"
        )
    return Predictor(*_read(path, opts))


class Predictor:
    """A detector in PyTorch, with the size and the channel order of images that its config says.

    Attributes:
        cfg: the config of the plain detector.
        categories: see :class:`ImagePredictor`.
    """

    def __init__(self, cfg: CfgNode, categories: Categories) -> None:
        """
        Args:
            cfg: its MODEL.WEIGHTS are trained. Without a GPU, it runs on the CPU, whatever MODEL.DEVICE is.
            categories: as many as the detector has classes.

        Raises:
            UserError: the weights are missing, or not this detector's.
        """
        if not cfg.MODEL.WEIGHTS:
            raise UserError("the config's MODEL.WEIGHTS is empty: set it to the weights of the trained detector")
        cfg = without_distillation(cfg)
        if not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        self.cfg, self.categories = cfg, categories
        self._model = build_model(cfg).eval()
        checkpointer = WeightsCheckpointer(self._model)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        if checkpointer.unset_keys:
            raise UserError(
                f"the weights {cfg.MODEL.WEIGHTS} do not set {len(checkpointer.unset_keys)} tensors of the detector, "
                f"such as {checkpointer.unset_keys[0]}: give the weights of a trained detector of this config"
            )
        self._augmentations = T.AugmentationList(build_augmentation(cfg, is_train=False))

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """See :class:`ImagePredictor`."""
        height, width = image.shape[:2]
        if self.cfg.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        augmented = T.AugInput(image)
        self._augmentations(augmented)
        tensor = torch.as_tensor(augmented.image.astype("float32").transpose(2, 0, 1))
        (output,) = self._model([{"image": tensor, "height": height, "width": width}])
        return output["instances"].to("cpu")


def _read(path: str, opts: Sequence[str]) -> Tuple[CfgNode, Categories]:
    """Return the config, with the trained weights, and the categories."""
    config_file = path
    if os.path.isdir(path):
        configs = [os.path.join(path, name) for name in (STUDENT_CONFIG, "config.yaml")]
        there = [config for config in configs if os.path.isfile(config)]
        weights = os.path.join(path, STUDENT_WEIGHTS)
        if not there or not os.path.isfile(weights):
            missing = STUDENT_WEIGHTS if there else f"{STUDENT_CONFIG} and no config.yaml"
            raise UserError(
                f"--model {path} has no {missing}: give the folder of a finished training, or a yaml config whose "
                "MODEL.WEIGHTS are trained"
            )
        config_file, opts = there[0], ["MODEL.WEIGHTS", weights, *opts]
    cfg = merge_config(find_config_file(config_file, "--model"), list(opts), config_file)
    if "MODEL.WEIGHTS" not in opts[::2]:
        cfg.MODEL.WEIGHTS = trained_weights(config_file, cfg)
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(config_file))
    return cfg, _categories(cfg, folder)


def _categories(cfg: CfgNode, folder: str) -> Categories:
    """Return the categories that stand beside the weights, or else those of the config's training set."""
    number = class_head(cfg).NUM_CLASSES
    candidates: List[Any] = [load_categories(folder)]
    json_file = cfg.DATASETS.COCO_FOLDER.TRAIN_JSON
    if json_file and os.path.isfile(json_file):
        candidates.append(categories_of_json(json_file))
    names: Optional[List[str]] = classes_without_loading(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
    candidates += [numbered_categories(names or ()), numbered_categories([f"class {i}" for i in range(number)])]
    return next(categories for categories in candidates if categories and len(categories) == number)
