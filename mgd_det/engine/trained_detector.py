"""Find and build a trained detector: the folder of its training, a yaml config, or a name of a model zoo."""

import logging
import os
from typing import List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.checkpoint.resumable import named_checkpoint
from mgd_det.config import class_head, merge_config, without_distillation
from mgd_det.data.categories import (
    Categories,
    categories_of_json,
    categories_of_set,
    load_categories,
    unknown_categories,
)
from mgd_det.errors import UserError
from mgd_det.files.student_files import STUDENT_CONFIG, STUDENT_WEIGHTS
from mgd_det.model_zoo import find_config_file
from mgd_det.modeling.teachers import trained_weights

logger = logging.getLogger(__name__)


def read_trained_detector(path: str, opts: Sequence[str] = ()) -> Tuple[CfgNode, Categories]:
    """Return the config of a trained detector, without its distillation, and its categories.

    Args:
        path: the folder of a training (config.yaml or student.yaml, and model_final.pth or a checkpoint), a yaml config
            whose MODEL.WEIGHTS are trained, or a name of a model zoo.
        opts: overrides of the config, KEY, VALUE...

    Returns:
        The config, whose MODEL.WEIGHTS are trained, and as many categories as the detector has classes.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    config_file = path
    if os.path.isdir(path):
        config_file, weights = _files_of_training(path, needs_weights="MODEL.WEIGHTS" not in opts[::2])
        opts = ["MODEL.WEIGHTS", weights, *opts]
    cfg = merge_config(find_config_file(config_file, "--model"), list(opts), config_file)
    if "MODEL.WEIGHTS" not in opts[::2]:
        cfg.MODEL.WEIGHTS = trained_weights(config_file, cfg)
    if not cfg.MODEL.WEIGHTS:
        raise UserError(f"--model {path} names no weights: set MODEL.WEIGHTS to those of the trained detector")
    return without_distillation(cfg), _categories(cfg, os.path.dirname(os.path.abspath(config_file)))


def build_trained_detector(cfg: CfgNode) -> nn.Module:
    """Build the detector of a config and load MODEL.WEIGHTS, in eval mode.

    Raises:
        UserError: the weights are missing, or leave a tensor of the detector unset.
    """
    detector = build_model(cfg).eval()
    checkpointer = WeightsCheckpointer(detector)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    if checkpointer.unset_keys:
        raise UserError(
            f"the weights {cfg.MODEL.WEIGHTS} do not set {len(checkpointer.unset_keys)} tensors of the detector, such "
            f"as {checkpointer.unset_keys[0]}: give the weights of a trained detector of this config"
        )
    return detector


def _files_of_training(folder: str, needs_weights: bool) -> Tuple[str, str]:
    """Return the paths of the config and of the weights in the folder of a training."""
    configs = [os.path.join(folder, name) for name in ("config.yaml", STUDENT_CONFIG)]  # the first knows the data
    found = [config for config in configs if os.path.isfile(config)]
    weights = os.path.join(folder, STUDENT_WEIGHTS)
    if not os.path.isfile(weights):  # the training has not ended
        weights = os.path.join(folder, named_checkpoint(folder) or "")
    if not found or (needs_weights and not os.path.isfile(weights)):
        missing = f"{STUDENT_WEIGHTS} and no checkpoint" if found else f"{STUDENT_CONFIG} and no config.yaml"
        raise UserError(
            f"--model {folder} has no {missing}: give the folder of a training, or a yaml config whose MODEL.WEIGHTS "
            "are trained"
        )
    return found[0], weights


def _categories(cfg: CfgNode, folder: str) -> Categories:
    """Return the categories that stand beside the weights, or else those of the config's data sets."""
    number = class_head(cfg).NUM_CLASSES
    candidates: List[Categories] = [load_categories(folder) or []]
    jsons = (cfg.DATASETS.COCO_FOLDER.TRAIN_JSON, cfg.DATASETS.COCO_FOLDER.VAL_JSON)
    candidates += [categories_of_json(path) for path in jsons if os.path.isfile(path)]
    candidates += [categories_of_set(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    for categories in candidates:
        if len(categories) == number:
            return categories
    logger.warning(
        f"DATASETS.TRAIN {cfg.DATASETS.TRAIN} does not tell the detector's {number} classes, so they are called class "
        f"1 to class {number}, with the category ids 1 to {number}"
    )
    return unknown_categories(number)
