"""The optional packages of an export."""

import importlib
from typing import Any

from mgd_det.errors import UserError

_EXTRAS = {"onnx": "export", "onnxscript": "export", "onnxruntime": "export", "openvino": "openvino"}


def require(module: str) -> Any:
    """Import a module of an optional package, such as "onnxruntime.quantization".

    Raises:
        UserError: the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as e:
        extra = _EXTRAS[package]
        raise UserError(f"this needs the package {package} ({e}): `pip install 'mgd_det[{extra}]'`") from e
