"""A trained detector by name: of the model zoo, of a yaml config, or of the folder of a training."""

import os
from dataclasses import dataclass
from typing import Any, Sequence

from detectron2.config import CfgNode

from mgd_det.checkpoint.training_files import files_of_training
from mgd_det.config import merge_config
from mgd_det.errors import UserError
from mgd_det.model_zoo import find_config_file, is_lazy_config
from mgd_det.modeling.teachers import teacher_config


@dataclass(frozen=True)
class TrainedDetector:
    """A detector's files.

    Attributes:
        config_file: MODEL.MGD.TEACHER.CONFIG_FILE: an absolute path, or a name of a model zoo.
        weights: MODEL.MGD.TEACHER.WEIGHTS; "" for those of the model zoo, or of the config.
        cfg: the config of the plain detector, with the weights as MODEL.WEIGHTS.
    """

    config_file: str
    weights: str
    cfg: CfgNode


def find_teacher(name: str, weights: str = "", opts: Sequence[Any] = ()) -> TrainedDetector:
    """Find the config and the weights of a teacher.

    Args:
        name: a name of a model zoo, the path of a yaml config, or the folder of a finished training.
        weights: path or URL of its weights, instead of those of the zoo, the config or the folder.
        opts: overrides of its config, KEY, VALUE...

    Raises:
        UserError: a file is missing, or the config has an error.
    """
    config_file = name
    if os.path.isdir(name):
        config_file, own = files_of_training(name, "--teacher", needs_weights=not weights, finished=True)
        if weights and "://" not in weights and not os.path.isfile(weights):
            raise UserError(f"--teacher-weights {weights} does not exist")
        weights = weights or own
    find_config_file(config_file, "--teacher")  # its error names the flag
    if is_lazy_config(config_file):
        raise UserError(f"--teacher {name}: {config_file} is a LazyConfig. Give a yaml config of the same detector")
    # As a path that stays right in a config that is read from elsewhere; a name of a zoo is one already.
    config_file, weights = absolute(config_file), absolute(weights)
    cfg = merge_config("", [])
    cfg.MODEL.MGD.TEACHER.CONFIG_FILE, cfg.MODEL.MGD.TEACHER.WEIGHTS = config_file, weights
    cfg.MODEL.MGD.TEACHER.OPTS = list(opts)
    plain = teacher_config(cfg)
    if not plain.MODEL.WEIGHTS:
        raise UserError(f"--teacher {name} names no trained weights: give them by --teacher-weights")
    if os.path.isabs(config_file) and not weights:
        weights = absolute(plain.MODEL.WEIGHTS)  # a path in the config may be relative too
    return TrainedDetector(config_file, weights, plain)


def absolute(path: str) -> str:
    """Return the absolute path of a file that exists; anything else (a URL, a name, "") as it is."""
    return os.path.abspath(path) if "://" not in path and os.path.exists(path) else path
