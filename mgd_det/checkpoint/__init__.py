"""Weights from files: those of Detectron2, torchvision and timm."""

from mgd_det.checkpoint.conversion import Converted, convert_weights
from mgd_det.checkpoint.half_precision import write_half_precision
from mgd_det.checkpoint.load_report import LoadReport
from mgd_det.checkpoint.sources import fetch_named_weights
from mgd_det.checkpoint.training_checkpointer import CheckpointWriteError, TrainingCheckpointer
from mgd_det.checkpoint.weights import WeightsCheckpointer

__all__ = [
    "CheckpointWriteError",
    "Converted",
    "LoadReport",
    "TrainingCheckpointer",
    "WeightsCheckpointer",
    "convert_weights",
    "fetch_named_weights",
    "write_half_precision",
]
