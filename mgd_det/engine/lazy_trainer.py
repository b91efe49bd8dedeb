"""Training and evaluation of what a LazyConfig describes: what :mod:`mgd_det.engine.trainer` is for yaml."""

import copy
import logging
from typing import Any

from detectron2.config import instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch import nn

from mgd_det.checkpoint import TrainingCheckpointer, WeightsCheckpointer
from mgd_det.data.resumable_loader import build_resumable_train_loader
from mgd_det.distributed.ranks import distributed
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.evaluation import EvaluationHook
from mgd_det.engine.hooks.interruption import Interruption
from mgd_det.engine.hooks.loss_normalizer import LossNormalizer
from mgd_det.engine.hooks.matching_update import MatchingUpdate
from mgd_det.engine.hooks.random_state import RandomState
from mgd_det.engine.non_finite import NonFinitePolicy
from mgd_det.engine.training_errors import explained_training_errors
from mgd_det.engine.training_step import TrainStep
from mgd_det.errors import UserError
from mgd_det.seeding import Purpose, seeded

logger = logging.getLogger(__name__)


def is_distilled(cfg: DictConfig) -> bool:
    """Whether the detector's backbone is an MGDBackbone."""
    return "student" in cfg.model.backbone


def student_config(cfg: DictConfig) -> DictConfig:
    """A copy of the config that builds the plain student; of a config without distillation, a plain copy."""
    cfg = copy.deepcopy(cfg)
    if is_distilled(cfg):
        cfg.model.backbone = cfg.model.backbone.student
        cfg.train.pop("matching", None)
    return cfg


def train(cfg: DictConfig, resume: bool = False) -> None:
    """Trains, with distillation where the config has it.

    Args:
        cfg: the entries that Detectron2's tools/lazyconfig_train_net.py reads (model, dataloader, optimizer,
            lr_multiplier and train) and, where the model is distilled, train.matching: the arguments of
            :class:`MatchingUpdate`. It may have train.accumulate, the batches of a step, and train.non_finite, the
            arguments of :class:`NonFinitePolicy`.
        resume: go on from the last checkpoint of train.output_dir.
    """
    model = instantiate(cfg.model)
    logger.info(f"Model:\n{model}")
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = distributed(model, **cfg.train.ddp)
    trainer = TrainStep(
        model,
        [],  # its data loader is made when the checkpoint has told the seed
        optimizer,
        accumulate=cfg.train.get("accumulate", 1),
        non_finite=_non_finite_policy(cfg),
        amp=cfg.train.amp.enabled,
    )
    checkpointer = TrainingCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    # Up to the first that rank 0 alone has, the order is the same on every rank: the matching's update is collective.
    random_state = RandomState(cfg.train.get("seed", -1), trainer.batches_per_iteration)
    trainer_hooks = [
        random_state,
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        LossNormalizer(model),
    ]
    if is_distilled(cfg):
        trainer_hooks.append(_matching_hook(cfg, model))
    trainer_hooks.append(Interruption(checkpointer, trainer))
    if comm.is_main_process():
        trainer_hooks.append(CheckpointHook(checkpointer, **cfg.train.checkpointer))
    trainer_hooks.append(EvaluationHook(cfg.train.eval_period, lambda: _test(cfg, model)))
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        trainer_hooks.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    trainer.register_hooks(trainer_hooks)

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    with seeded(Purpose.ORDER, random_state.seed):
        trainer.data_loader = _train_loader(cfg)
    advice = (
        "Lower optimizer.lr or model.backbone.losses, or lengthen the warm-up of lr_multiplier; "
        "train.non_finite.policy=skip leaves out single steps."
    )
    with explained_training_errors(checkpointer, advice):
        # A checkpoint's iteration is the one that was finished last.
        trainer.train(trainer.iter + 1 if checkpointer.resumed_from else 0, cfg.train.max_iter)


def _non_finite_policy(cfg: DictConfig) -> NonFinitePolicy:
    options = cfg.train.get("non_finite", {})
    try:
        return NonFinitePolicy(**options)
    except TypeError as e:
        raise UserError(f"train.non_finite is {options}; it takes policy and max_in_a_row") from e


def _matching_hook(cfg: DictConfig, model: nn.Module) -> MatchingUpdate:
    if "matching" not in cfg.train:
        raise UserError(
            "train.matching is not in the config: give the arguments of MatchingUpdate, for example "
            "train.matching = dict(num_batches=1000, periods=[5000])"
        )
    seed = max(cfg.train.get("seed", 0), 0)
    period = cfg.train.checkpointer.period
    arguments = {"seed": seed, "checkpoint_period": period, **cfg.train.matching}
    return MatchingUpdate(model, lambda: _train_loader(cfg), **arguments)


def _train_loader(cfg: DictConfig) -> Any:
    loader = cfg.dataloader.train
    target = loader.get("_target_")
    if (locate(target) if isinstance(target, str) else target) is build_detection_train_loader:
        loader._target_ = build_resumable_train_loader
    return instantiate(loader)


def evaluate(cfg: DictConfig, resume: bool = False) -> Any:
    """Evaluates the model with train.init_checkpoint, or with the last checkpoint of train.output_dir."""
    model = instantiate(cfg.model).to(cfg.train.device)
    checkpointer = WeightsCheckpointer(model, cfg.train.output_dir)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return _test(cfg, model)


def _test(cfg: DictConfig, model: nn.Module) -> Any:
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results
