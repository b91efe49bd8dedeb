"""Training: the trainers of yaml configs and LazyConfigs, the training step, and the hooks of both."""

from mgd_det.engine.hooks.matching_update import MatchingUpdate
from mgd_det.engine.trainer import Trainer, load_and_test

__all__ = ["MatchingUpdate", "Trainer", "load_and_test"]
