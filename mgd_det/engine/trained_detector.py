"""Find and build a trained detector: the folder of its training, a config, or a name of a model zoo."""

import logging
import os
from typing import List, NamedTuple, Optional, Sequence

from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig, ListConfig
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.checkpoint.training_files import files_of_training
from mgd_det.config import class_head, merge_config, without_distillation
from mgd_det.data.categories import (
    Categories,
    categories_of_json,
    categories_of_set,
    load_categories,
    unknown_categories,
)
from mgd_det.engine.lazy_detector import read_lazy_detector
from mgd_det.errors import UserError
from mgd_det.model_zoo import find_config_file, is_lazy_config
from mgd_det.modeling.teachers import trained_weights

logger = logging.getLogger(__name__)


class LoadableDetector(NamedTuple):
    """How to build a trained detector, and what it finds.

    Attributes:
        cfg: its config, without distillation; MODEL.WEIGHTS are trained. Of a LazyConfig: what
            :func:`mgd_det.engine.lazy_detector.read_lazy_detector` makes of it.
        categories: as many as it has classes.
        network: "model" of a LazyConfig, which builds it instead of ``cfg``; None for a yaml config.
    """

    cfg: CfgNode
    categories: Categories
    network: Optional[DictConfig] = None


def read_trained_detector(path: str, opts: Sequence[str] = (), device: str = "") -> LoadableDetector:
    """Find a trained detector and its categories, and read its config.

    Args:
        path: the folder of a training (config.yaml or student.yaml, and model_final.pth or a checkpoint), a yaml config
            whose MODEL.WEIGHTS are trained, a LazyConfig (.py or yaml) whose train.init_checkpoint is, or a name of a
            model zoo.
        opts: overrides of the config, KEY, VALUE...; of a LazyConfig KEY=VALUE...
        device: instead of the config's; "" for that.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    config_file, weights = path, ""
    opts = list(opts)
    given = "MODEL.WEIGHTS" in opts[::2] or any(opt.startswith("train.init_checkpoint=") for opt in opts)
    if os.path.isdir(path):
        config_file, weights = files_of_training(path, "--model", needs_weights=not given)
    network = None
    if is_lazy_config(config_file):
        cfg, network = read_lazy_detector(config_file, "" if given else weights, opts, "--model")
    else:
        cfg = _read_yaml(config_file, ["MODEL.WEIGHTS", weights, *opts] if weights else opts)
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    return LoadableDetector(cfg, _categories(cfg, os.path.dirname(os.path.abspath(config_file))), network)


def _read_yaml(config_file: str, opts: List[str]) -> CfgNode:
    cfg = merge_config(find_config_file(config_file, "--model"), opts, config_file)
    if "MODEL.WEIGHTS" not in opts[::2]:
        cfg.MODEL.WEIGHTS = trained_weights(config_file, cfg)
    if not cfg.MODEL.WEIGHTS:
        raise UserError(f"--model {config_file} names no weights: set MODEL.WEIGHTS to those of the trained detector")
    return without_distillation(cfg)


def build_trained_detector(cfg: CfgNode, network: Optional[DictConfig] = None) -> nn.Module:
    """Build a detector and load MODEL.WEIGHTS, in eval mode.

    Args:
        cfg: see :class:`LoadableDetector`.
        network: see :class:`LoadableDetector`.

    Raises:
        UserError: the weights are missing, or leave a tensor of the detector unset.
    """
    detector = build_model(cfg) if network is None else _instantiated(network).to(cfg.MODEL.DEVICE)
    detector.eval()
    checkpointer = WeightsCheckpointer(detector)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    if checkpointer.unset_keys:
        raise UserError(
            f"the weights {cfg.MODEL.WEIGHTS} do not set {len(checkpointer.unset_keys)} tensors of the detector, such "
            f"as {checkpointer.unset_keys[0]}: give the weights of a trained detector of this config"
        )
    return detector


def _instantiated(network: DictConfig) -> nn.Module:
    """Build the network of a LazyConfig. Lists that its modules keep are Python's: torch.export knows no others."""
    detector = instantiate(network)
    for module in detector.modules():
        for name, value in vars(module).items():
            if isinstance(value, ListConfig):
                setattr(module, name, list(value))
    return detector


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
