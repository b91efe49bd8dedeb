"""Training: the trainer, the hook that updates the matching, and the set-up of a run."""

from mgd_det.engine.launch import launch
from mgd_det.engine.matching_hook import MatchingUpdate
from mgd_det.engine.messages import run_program
from mgd_det.engine.setup import argument_parser, read_config, setup
from mgd_det.engine.trainer import Trainer, load_and_test

__all__ = [
    "MatchingUpdate",
    "Trainer",
    "argument_parser",
    "launch",
    "load_and_test",
    "read_config",
    "run_program",
    "setup",
]
