"""One training of a study, in this process, with the linear evaluation of what it has learned without labels."""

import gc
import os
import shutil
import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from detectron2.config import instantiate
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, OmegaConf

from mgd_det.checkpoint.safe_loading import load_torch_file
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


def is_unsupervised(cfg: DictConfig) -> bool:
    """Return whether a training has no score of its own, since it needs a linear evaluation."""
    return "evaluator" not in cfg.dataloader


def train_once(cfg: DictConfig, seed: int, folder: Path, linear: Optional[DictConfig] = None) -> Dict[str, float]:
    """Train from the start and evaluate.

    Args:
        cfg: the training.
        seed: of its weights, images and order.
        folder: for its checkpoint and metrics; what it holds is removed.
        linear: for an unsupervised training, the training of a classifier that starts with the backbone learned and
            scores it; it runs in the folder "linear" of ``folder``, with the same seed. None scores nothing.

    Returns:
        top1 and top5 in percent, if there is a score, and cpu_seconds of this process, for all.

    Raises:
        UserError: the classifier's backbone is not the one that was trained.
    """
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    cfg.train.output_dir, cfg.train.seed = str(folder), seed
    seed_all_rng(seed)
    start = time.process_time()
    lazy_trainer.train(cfg)
    seconds = time.process_time() - start
    gc.collect()  # trainer and hooks refer to each other
    if not is_unsupervised(cfg):
        metrics = read_metrics(str(folder / "metrics.json"))
        return {**{name: float(metrics[f"accuracy/{name}"][1][-1]) for name in _SCORES}, "cpu_seconds": seconds}
    if linear is None:
        return {"cpu_seconds": seconds}
    linear.train.init_checkpoint = str(folder / "model_final.pth")
    _check_backbone(linear)
    scores = train_once(linear, seed, folder / "linear")
    return {**scores, "cpu_seconds": seconds + scores["cpu_seconds"]}


def _check_backbone(linear: DictConfig) -> None:
    """Raise UserError unless train.init_checkpoint has every tensor of the backbone: others would stay random."""
    path = linear.train.init_checkpoint
    found = load_torch_file(path)["model"]
    for name, tensor in instantiate(linear.model.backbone).state_dict().items():
        shape = getattr(found.get(f"backbone.{name}"), "shape", None)
        if shape != tensor.shape:
            given = "no such tensor" if shape is None else f"one of shape {tuple(shape)}"
            raise UserError(
                f"the linear evaluation's model.backbone has {name} of shape {tuple(tensor.shape)}, but the training's "
                f"{path} has {given}: give both configs the same backbone"
            )
