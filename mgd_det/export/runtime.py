"""Run an exported detector as Detectron2 runs its own, whatever its format."""

import inspect
import os
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from mgd_det.errors import UserError, first_line
from mgd_det.export.formats import FORMATS
from mgd_det.export.packages import require
from mgd_det.export.postprocessing import (
    SETTINGS_KEY,
    Detections,
    as_input,
    detections,
    network_input,
    read_settings,
)

_Run = Callable[[np.ndarray], Sequence[np.ndarray]]


class ExportedDetector:
    """An exported model on the CPU.

    It takes and returns what a Detectron2 model does in eval mode, so that Detectron2's evaluators score it.

    Attributes:
        path: of the file.
        settings: of the model's metadata.
    """

    def __init__(self, path: str, threads: int = 0) -> None:
        """
        Args:
            path: a file of :func:`mgd_det.export.write_model`; the suffix tells its format.
            threads: of the runtime; 0 for its default. torch.export has torch's.

        Raises:
            UserError: the file is missing, of another kind, or needs a package that is not installed.
        """
        self.path, suffix = path, os.path.splitext(path)[1]
        opener = {".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_torch}.get(suffix)
        if opener is None:
            raise UserError(f"{path} is no exported model: its name ends in none of {', '.join(FORMATS.values())}")
        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist: make it by tools/export.py")
        try:
            text, self._run = opener(path, threads)
            self.settings = read_settings(text)
        except UserError:
            raise
        except Exception as e:  # each runtime has its own
            raise UserError(f"{path} cannot be read as a model of tools/export.py: {first_line(e)}") from e

    def raw_outputs(self, pixels: np.ndarray) -> List[np.ndarray]:
        """Run the network on resized pixels (3, H, W), 0 to 255, in its channel order."""
        return list(self._run(as_input(pixels, self.settings)))

    def detect(self, pixels: np.ndarray, image_size: Sequence[int]) -> Detections:
        """Find the objects in resized pixels (3, H, W); their boxes are in the pixels of an image of another size."""
        return detections(self.raw_outputs(pixels), self.settings, pixels.shape[1:], image_size)

    def predict(self, image: np.ndarray) -> Detections:
        """Find the objects in an image (H, W, 3) uint8 RGB."""
        network_pixels, size = network_input(image, self.settings)
        return detections(list(self._run(network_pixels)), self.settings, size, image.shape[:2])

    def __call__(self, inputs: List[Dict[str, Any]]) -> List[Dict[str, Instances]]:
        """Detect the objects of each image.

        Args:
            inputs: each with "image", a tensor (3, H, W), and "height" and "width" of the image.

        Returns:
            For each image "instances", in its pixels.
        """
        results = []
        for entry in inputs:
            pixels = entry["image"].numpy()
            size = (entry.get("height", pixels.shape[1]), entry.get("width", pixels.shape[2]))
            results.append({"instances": as_instances(self.detect(pixels, size), size)})
        return results


def as_instances(found: Detections, size: Tuple[int, int]) -> Instances:
    """Return the objects of an image of this height and width as Detectron2's Instances."""
    fields = {"scores": found.scores, "pred_classes": found.classes}
    if found.masks is not None:
        fields["pred_masks"] = found.masks
    if found.keypoints is not None:
        fields["pred_keypoints"] = found.keypoints
    tensors = {name: torch.from_numpy(value) for name, value in fields.items()}
    return Instances(size, pred_boxes=Boxes(torch.from_numpy(found.boxes)), **tensors)


def _open_onnx(path: str, threads: int) -> Tuple[str, _Run]:
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (model_input,) = session.get_inputs()
    text = session.get_modelmeta().custom_metadata_map[SETTINGS_KEY]
    return text, lambda images: session.run(None, {model_input.name: images})


def _open_openvino(path: str, threads: int) -> Tuple[str, _Run]:
    openvino = require("openvino")
    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info([SETTINGS_KEY]).astype(str)
    options = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = core.compile_model(model, "CPU", options)
    return text, lambda images: [np.array(output) for output in compiled(images).values()]


def _open_torch(path: str, threads: int) -> Tuple[str, _Run]:
    files = {SETTINGS_KEY: ""}
    program = torch.export.load(path, extra_files=files)
    # Its guards refuse images of which the last level is a single cell, though it computes them like any other.
    unguarded = "check_guards" in inspect.signature(program.module).parameters
    network = program.module(check_guards=False) if unguarded else program.module()
    text = files[SETTINGS_KEY]

    def run(images: np.ndarray) -> List[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in network(torch.from_numpy(images))]

    return text if isinstance(text, str) else text.decode(), run
