"""Make the core of a detector int8: ONNX Runtime's static quantization, calibrated on images."""

import os
import tempfile
from itertools import chain
from typing import Any, Dict, Iterable, Iterator, Optional

import numpy as np

from mgd_det.errors import UserError
from mgd_det.export.formats import write_metadata
from mgd_det.export.packages import require
from mgd_det.export.postprocessing import Settings, as_input


def quantize_core(path: str, output: str, settings: Settings, inputs: Iterable[Dict[str, Any]]) -> None:
    """Write the int8 version of an ONNX core, with QuantizeLinear and DequantizeLinear around its convolutions.

    Weights are int8, one scale a channel, in seven bits, because x86 CPUs without VNNI saturate with eight.

    Args:
        path: a core of :func:`mgd_det.export.write_model`.
        output: the file to write.
        settings: of the core.
        inputs: images to measure the ranges of activations on, as Detectron2's mapper makes them.

    Raises:
        UserError: there is no image, or a package is missing.
    """
    require("onnx")
    tools = require("onnxruntime.quantization")
    shape_inference = require("onnxruntime.quantization.shape_inference")
    entries = iter(inputs)
    first = next(entries, None)
    if first is None:
        raise UserError("there is no image to calibrate int8 on: give a data set that has images")
    reader = _reader(tools.CalibrationDataReader, settings, chain([first], entries))
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(output))) as folder:
        prepared = os.path.join(folder, "prepared.onnx")
        shape_inference.quant_pre_process(path, prepared, skip_symbolic_shape=True)
        tools.quantize_static(
            prepared,
            output,
            reader,
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            reduce_range=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
        )
    write_metadata(output, settings)


def _reader(base: type, settings: Settings, inputs: Iterator[Dict[str, Any]]) -> Any:
    class Reader(base):
        def get_next(self) -> Optional[Dict[str, np.ndarray]]:
            entry = next(inputs, None)
            return None if entry is None else {"images": as_input(entry["image"].numpy(), settings)}

    return Reader()
