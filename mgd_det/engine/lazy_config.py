"""Read a LazyConfig, in Python or as yaml, with overrides."""

from typing import Sequence

import yaml
from detectron2.config import LazyConfig
from omegaconf import DictConfig

from mgd_det.errors import UserError, first_line
from mgd_det.files.student_files import weights_beside
from mgd_det.files.unsafe_files import refuse_unsafe
from mgd_det.model_zoo import find_config_file


def read_config(name: str, opts: Sequence[str], flag: str = "--config-file") -> DictConfig:
    """Read the LazyConfig of a path or of a name of a model zoo, with overrides.

    Args:
        name: a path, or a name of a model zoo.
        opts: KEY=VALUE...
        flag: the flag that names it, for the error.

    Raises:
        UserError: the config cannot be read, is incomplete, or is a yaml file without --allow-unsafe-files; or an
            override cannot be applied.
    """
    path = find_config_file(name, flag, lazy=True)
    try:
        if not path.endswith(".py"):
            refuse_unsafe(
                path, "a LazyConfig in yaml names the functions to call (a config with MODEL is for tools/train_net.py)"
            )
        cfg = LazyConfig.load(path)
    except (SyntaxError, ValueError, OSError, yaml.YAMLError, UserError) as e:
        raise UserError(f"{flag} {name}: {e.__cause__ or e}") from e
    missing = {"model", "dataloader", "optimizer", "lr_multiplier", "train"} - set(cfg)
    if missing:
        raise UserError(f"{flag} {name} is not a LazyConfig of a training: it lacks {', '.join(sorted(missing))}")
    if cfg.train.get("init_checkpoint"):
        cfg.train.init_checkpoint = weights_beside(path, cfg.train.init_checkpoint)
    for opt in opts:
        try:
            LazyConfig.apply_overrides(cfg, [opt])
        except Exception as e:  # the parser, OmegaConf and Detectron2 each have their own
            raise UserError(
                f"the override {opt!r} cannot be applied: {first_line(e)}. Give KEY=VALUE, with a key of the config"
            ) from e
    return cfg


def is_distilled(cfg: DictConfig) -> bool:
    """Return whether the detector's backbone is ``L(distilled_backbone)(student=...)``."""
    return "student" in cfg.model.backbone


def target_name(node: DictConfig) -> str:
    """Return the name of the class or function that a node calls."""
    target = node.get("_target_")
    return getattr(target, "__name__", str(target).rpartition(".")[2])
