"""Write a detector as a file of another runtime."""

import json
import os
import tempfile
from typing import Any, Dict, Optional

import torch
from torch import nn

from mgd_det.errors import check_choice
from mgd_det.export.core import traced_core
from mgd_det.export.packages import require
from mgd_det.export.postprocessing import SETTINGS_KEY, Settings
from mgd_det.export.whole import export_whole

# Suffix of the model file by format.
FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
# The opset that torch's exporter writes without a conversion.
CORE_OPSET = 18


def write_model(
    detector: nn.Module, settings: Settings, path: str, model_format: str, pixels: Optional[torch.Tensor] = None
) -> None:
    """Write a detector in eval mode, with its settings in the metadata.

    Args:
        detector: RetinaNet or FCOS; for settings of kind "whole", any of Detectron2's.
        settings: of :func:`mgd_det.export.detector_settings`.
        path: the file to write. OpenVINO also writes a ``.bin`` beside it.
        model_format: one of :data:`FORMATS`; "onnx" for settings of kind "whole".
        pixels: for those, the image to trace (:func:`mgd_det.export.whole.export_whole`).

    Raises:
        ArgumentError: there is no such format.
        UserError: a package is missing.
    """
    check_choice("model_format", model_format, FORMATS)
    if model_format == "torch":
        torch.export.save(traced_core(detector), path, extra_files={SETTINGS_KEY: json.dumps(settings)})
    elif model_format == "openvino":
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as folder:
            onnx_path = os.path.join(folder, "core.onnx")
            write_model(detector, settings, onnx_path, "onnx")
            openvino_from_onnx(onnx_path, settings, path)
    elif settings["kind"] == "whole":
        require("onnx")
        settings = {**settings, "outputs": export_whole(detector, path, pixels)}
        write_metadata(path, settings)
    else:
        for package in ("onnx", "onnxscript"):
            require(package)
        program = torch.onnx.export(
            traced_core(detector),
            dynamo=True,
            opset_version=CORE_OPSET,
            input_names=["images"],
            output_names=settings["outputs"],
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)
        write_metadata(path, settings)


def openvino_from_onnx(onnx_path: str, settings: Settings, path: str) -> None:
    """Convert an ONNX file to OpenVINO's format, in float32, with the settings in its metadata."""
    openvino = require("openvino")
    model = openvino.Core().read_model(onnx_path)
    model.set_rt_info(json.dumps(settings), [SETTINGS_KEY])
    openvino.save_model(model, path, compress_to_fp16=False)


def write_metadata(path: str, settings: Dict[str, Any]) -> None:
    """Put the settings into the metadata of an ONNX file."""
    onnx = require("onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {SETTINGS_KEY: json.dumps(settings)})
    onnx.save(model, path)
