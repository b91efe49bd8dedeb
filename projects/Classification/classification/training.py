"""One training of a study, in this process."""

import gc
import os
import shutil
import time
from pathlib import Path
from typing import Any, Dict, Mapping

from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, OmegaConf

from mgd_det.engine import lazy_trainer
from mgd_det.engine.lazy_config import read_config
from mgd_det.errors import UserError
from mgd_det.visualization.curves import read_metrics

_SCORES = ("top1", "top5")


def overridden(config: str, overrides: Mapping[str, Any]) -> DictConfig:
    """Return the LazyConfig of a file with some of its keys replaced.

    Raises:
        UserError: the config cannot be read, or has no node for a key.
    """
    cfg = read_config(config, [])
    for key, value in overrides.items():
        parent = key.rpartition(".")[0]
        if not isinstance(OmegaConf.select(cfg, parent), DictConfig):
            raise UserError(f"config {config} has no {parent!r}, of which {key} would be a part: check the override")
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def train_once(cfg: DictConfig, seed: int, folder: Path) -> Dict[str, float]:
    """Train from the start and evaluate.

    Args:
        cfg: the training.
        seed: of its weights, images and order.
        folder: for its checkpoint and metrics; what it holds is removed.

    Returns:
        top1 and top5 in percent, and cpu_seconds of this process.
    """
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    cfg.train.output_dir, cfg.train.seed = str(folder), seed
    seed_all_rng(seed)
    start = time.process_time()
    lazy_trainer.train(cfg)
    seconds = time.process_time() - start
    metrics = read_metrics(str(folder / "metrics.json"))
    gc.collect()  # trainer and hooks refer to each other
    return {**{name: float(metrics[f"accuracy/{name}"][1][-1]) for name in _SCORES}, "cpu_seconds": seconds}
