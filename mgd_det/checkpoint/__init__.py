"""Weights from files: Detectron2's, and those from elsewhere."""

from mgd_det.checkpoint.torchvision_weights import (
    convert_torchvision_weights,
    is_torchvision_weights,
    torchvision_weights_url,
)
from mgd_det.checkpoint.weights import WeightsCheckpointer

__all__ = [
    "WeightsCheckpointer",
    "convert_torchvision_weights",
    "is_torchvision_weights",
    "torchvision_weights_url",
]
