"""Training: the trainers of yaml configs and LazyConfigs, the training step, and the hooks of both. And predictions."""

from mgd_det.engine.hooks.matching_update import MatchingUpdate
from mgd_det.engine.predictor import ImagePredictor, Predictor, load_predictor
from mgd_det.engine.trainer import Trainer, load_and_test

__all__ = ["ImagePredictor", "MatchingUpdate", "Predictor", "Trainer", "load_and_test", "load_predictor"]
