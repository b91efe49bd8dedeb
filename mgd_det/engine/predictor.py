"""A trained detector for images, from the files that a training leaves."""

from typing import Optional, Protocol, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.structures import Instances
from omegaconf import DictConfig

from mgd_det.config import without_distillation
from mgd_det.data.categories import Categories
from mgd_det.engine.trained_detector import build_trained_detector, read_trained_detector
from mgd_det.errors import UserError
from mgd_det.export import FORMATS, ExportedDetector
from mgd_det.export.runtime import as_instances
from mgd_det.export.settings import require_rgb_or_bgr


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
    """Load a trained or an exported detector.

    Args:
        path: the folder of a training, a yaml config whose MODEL.WEIGHTS are trained, a LazyConfig whose
            train.init_checkpoint is, a name of a model zoo, or a model of tools/export.py (.onnx, .xml or .pt2).
        opts: overrides of the config, KEY, VALUE...; of a LazyConfig KEY=VALUE...; an exported model has none.

    Raises:
        UserError: a file is missing, cannot be read, or is not a trained detector's.
    """
    if path.endswith(tuple(FORMATS.values())):
        if opts:
            raise UserError(
                f"--model {path} is an exported model, which has no config to override: leave {opts[0]} out"
            )
        return ExportedPredictor(path)
    return Predictor(*read_trained_detector(path, opts))


class ExportedPredictor:
    """A model of tools/export.py, by the runtime of its format.

    Attributes:
        categories: see :class:`ImagePredictor`.
    """

    def __init__(self, path: str) -> None:
        """
        Args:
            path: of the model.

        Raises:
            UserError: it is missing, of another kind, or needs a package that is not installed.
        """
        self._detector = ExportedDetector(path)
        settings = self._detector.settings
        self.categories: Categories = [
            {"id": number, "name": name} for number, name in zip(settings["category_ids"], settings["classes"])
        ]

    def __call__(self, image: np.ndarray) -> Instances:
        """See :class:`ImagePredictor`."""
        return as_instances(self._detector.predict(image), image.shape[:2])


class Predictor:
    """A detector in PyTorch, with the size and the channel order of images that its config says.

    Attributes:
        cfg: the config of the plain detector.
        categories: see :class:`ImagePredictor`.
    """

    def __init__(self, cfg: CfgNode, categories: Categories, network: Optional[DictConfig] = None) -> None:
        """
        Args:
            cfg: its MODEL.WEIGHTS are trained. Without a GPU, it runs on the CPU, whatever MODEL.DEVICE is.
            categories: as many as the detector has classes.
            network: "model" of a LazyConfig, which builds the detector instead of ``cfg``.

        Raises:
            UserError: the weights are missing, or not this detector's.
        """
        require_rgb_or_bgr(cfg)
        cfg = without_distillation(cfg)
        if not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        self.cfg, self.categories = cfg, categories
        self._model = build_trained_detector(cfg, network)
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
