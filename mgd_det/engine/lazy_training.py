"""Training and evaluation of what a LazyConfig describes: what :mod:`mgd_det.engine.trainer` is for yaml."""

import logging
from typing import Any

from detectron2.config import instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.engine.lazy_setup import is_distilled
from mgd_det.engine.loss_normalizer import LossNormalizer
from mgd_det.engine.matching_hook import MatchingUpdate
from mgd_det.engine.messages import explained_training_errors
from mgd_det.errors import UserError

logger = logging.getLogger(__name__)


def train(cfg: DictConfig, resume: bool = False) -> None:
    """Trains, with distillation where the config has it.

    Args:
        cfg: the entries that Detectron2's tools/lazyconfig_train_net.py reads (model, dataloader, optimizer,
            lr_multiplier and train) and, where the model is distilled, train.matching: the arguments of
            :class:`MatchingUpdate`.
        resume: go on from the last checkpoint of train.output_dir.
    """
    model = instantiate(cfg.model)
    logger.info(f"Model:\n{model}")
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = trainer_class(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = WeightsCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    # Up to the first that rank 0 alone has, the order is the same on every rank: the matching's update is collective.
    trainer_hooks = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        LossNormalizer(model),
    ]
    if is_distilled(cfg):
        trainer_hooks.append(_matching_hook(cfg, model))
    if comm.is_main_process():
        trainer_hooks.append(hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
    trainer_hooks.append(hooks.EvalHook(cfg.train.eval_period, lambda: _test(cfg, model)))
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        trainer_hooks.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    trainer.register_hooks(trainer_hooks)

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    advice = "Lower optimizer.lr or model.backbone.losses, or lengthen the warm-up of lr_multiplier."
    with explained_training_errors(checkpointer, advice):
        # A checkpoint's iteration is the one that was finished last.
        trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)


def _matching_hook(cfg: DictConfig, model: nn.Module) -> MatchingUpdate:
    if "matching" not in cfg.train:
        raise UserError(
            "train.matching is not in the config: give the arguments of MatchingUpdate, for example "
            "train.matching = dict(num_batches=1000, periods=[5000])"
        )
    seed = max(cfg.train.get("seed", 0), 0)
    return MatchingUpdate(model, lambda: instantiate(cfg.dataloader.train), seed=seed, **cfg.train.matching)


def evaluate(cfg: DictConfig, resume: bool = False) -> Any:
    """Evaluates the model with train.init_checkpoint, or with the last checkpoint of train.output_dir."""
    model = instantiate(cfg.model).to(cfg.train.device)
    checkpointer = WeightsCheckpointer(model, cfg.train.output_dir)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return _test(cfg, create_ddp_model(model, **cfg.train.ddp))


def _test(cfg: DictConfig, model: nn.Module) -> Any:
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results
