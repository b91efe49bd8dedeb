"""Detectors outside PyTorch: ONNX, OpenVINO and torch.export, int8, verification, and post-processing in numpy."""

from mgd_det.export.formats import FORMATS, write_model
from mgd_det.export.runtime import ExportedDetector
from mgd_det.export.settings import detector_settings
from mgd_det.export.verification import Difference, Tolerance, verify

__all__ = [
    "FORMATS",
    "Difference",
    "ExportedDetector",
    "Tolerance",
    "detector_settings",
    "verify",
    "write_model",
]
