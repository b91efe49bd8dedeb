"""Times of a detector's inference: PyTorch, ONNX Runtime in float32 and int8, OpenVINO, and part by part."""

import copy
import os
from typing import Any, Callable, Dict, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from mgd_det.config import class_head
from mgd_det.export import ExportedDetector, detector_settings, write_model
from mgd_det.export.core import DenseCore
from mgd_det.export.formats import openvino_from_onnx
from mgd_det.export.postprocessing import detections
from mgd_det.export.quantization import quantize_core

Functions = Dict[str, Callable[[], Any]]

_CALIBRATION_IMAGES = 2  # of noise: the ranges do not change the time


class InferenceBenchmark:
    """A RetinaNet or an FCOS in several runtimes, each with the same number of threads.

    Attributes:
        parameters: their number.
        file_bytes: size of the exported file by runtime.
    """

    def __init__(self, detector: nn.Module, cfg: CfgNode, folder: str, threads: int, openvino: bool) -> None:
        """
        Args:
            detector: in eval mode, on the CPU.
            cfg: its config.
            folder: for the exported models.
            threads: of each runtime; for PyTorch, set them by ``torch.set_num_threads``.
            openvino: whether to measure OpenVINO too.

        Raises:
            UserError: the detector is of another kind, or a package is missing.
        """
        classes = [str(i) for i in range(class_head(cfg).NUM_CLASSES)]
        self._detector: Any = detector
        self._core = DenseCore(detector).eval()
        self.parameters = sum(parameter.numel() for parameter in self._core.parameters())
        settings = detector_settings(cfg, detector, classes)
        paths = {"ONNX Runtime": "core.onnx", "ONNX Runtime int8": "int8.onnx"}
        paths = {name: os.path.join(folder, file) for name, file in paths.items()}
        write_model(detector, settings, paths["ONNX Runtime"], "onnx")
        noise = [{"image": torch.from_numpy(_noise((320, 320), i))} for i in range(_CALIBRATION_IMAGES)]
        quantize_core(paths["ONNX Runtime"], paths["ONNX Runtime int8"], settings, noise)
        if openvino:
            paths["OpenVINO"] = os.path.join(folder, "core.xml")
            openvino_from_onnx(paths["ONNX Runtime"], settings, paths["OpenVINO"])
        self._exported = {name: ExportedDetector(path, threads) for name, path in paths.items()}
        self.file_bytes = {name: _size(path) for name, path in paths.items()}

    def networks(self, size: Tuple[int, int]) -> Functions:
        """Return functions that run the network, without post-processing, on an image of a size, by runtime."""
        pixels = _noise(size)
        images = self._detector.preprocess_image([{"image": torch.from_numpy(pixels)}]).tensor
        functions: Functions = {"PyTorch": _without_gradient(lambda: self._core(images))}
        for name, exported in self._exported.items():
            functions[name] = lambda exported=exported: exported.raw_outputs(pixels)  # type: ignore[misc]
        return functions

    def parts(self, size: Tuple[int, int]) -> Functions:
        """Return functions that run one part each on an image of a size: PyTorch's, and post-processing in numpy."""
        detector, pixels = self._detector, _noise(size)
        batch = detector.preprocess_image([{"image": torch.from_numpy(pixels)}])
        with torch.no_grad():
            stages = detector.backbone.bottom_up(batch.tensor)
            levels = detector.backbone(batch.tensor)
            features = [levels[name] for name in detector.head_in_features]
            predictions = detector.head(features)
        fpn = copy.copy(detector.backbone)
        fpn._modules = {**fpn._modules, "bottom_up": _Fixed(stages)}
        outputs = [level.numpy() for part in predictions for level in part]
        settings = self._exported["ONNX Runtime"].settings

        def post_processing() -> Any:  # it changes the predictions
            return detector.forward_inference(batch, features, [[x.clone() for x in part] for part in predictions])

        functions: Functions = {
            "bottom-up": lambda: detector.backbone.bottom_up(batch.tensor),
            "FPN": lambda: fpn(batch.tensor),
            "head": lambda: detector.head(features),
            "post-processing": post_processing,
            "post-processing in numpy": lambda: detections(outputs, settings, size, size),
        }
        return {f"part: {name}": _without_gradient(function) for name, function in functions.items()}


class _Fixed(nn.Module):
    """Returns the same features for any image."""

    def __init__(self, features: Dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._features = features

    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        return self._features


def _without_gradient(function: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(function)


def _noise(size: Tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, *size), dtype=np.uint8)


def _size(path: str) -> int:
    """Return the bytes of a model, which OpenVINO keeps in two files."""
    beside = os.path.splitext(path)[0] + ".bin"
    return os.path.getsize(path) + (os.path.getsize(beside) if path.endswith(".xml") else 0)
