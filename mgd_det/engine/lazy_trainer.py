"""Train and evaluate what a LazyConfig describes, as :mod:`mgd_det.engine.trainer` does for yaml."""

import copy
import inspect
import logging
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, TypeVar

import torch
from detectron2.config import LazyCall, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import default_writers
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.data.resumable_loader import build_resumable_train_loader
from mgd_det.distributed.ranks import distributed
from mgd_det.engine.coco_evaluator import FastCOCOEvaluator
from mgd_det.engine.evaluation import load_for_evaluation
from mgd_det.engine.hooks.best_checkpoint import BestCheckpoint
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.ema import EMAHook, evaluate_both
from mgd_det.engine.hooks.evaluation import EvaluationHook
from mgd_det.engine.hooks.matching_update import MatchingUpdate
from mgd_det.engine.hooks.random_state import RandomState
from mgd_det.engine.hooks.report import ReportHook
from mgd_det.engine.lazy_config import is_distilled
from mgd_det.engine.non_finite import NonFinitePolicy
from mgd_det.engine.run_report import lazy_report_options, lazy_run
from mgd_det.engine.training_errors import explained_training_errors
from mgd_det.engine.training_hooks import training_hooks
from mgd_det.engine.training_step import TrainStep
from mgd_det.engine.wandb_writer import WandbWriter
from mgd_det.errors import UserError, named_as
from mgd_det.modeling import inherit_from_teacher, unwrapped
from mgd_det.modeling.narrowing import NO_CRITERION
from mgd_det.seeding import Purpose, seeded

logger = logging.getLogger(__name__)

Made = TypeVar("Made")


def student_config(cfg: DictConfig) -> DictConfig:
    """Return a copy of the config without distillation, which builds the plain student."""
    cfg = copy.deepcopy(cfg)
    if is_distilled(cfg):
        cfg.model.backbone = cfg.model.backbone.student
        for key in ("matching", "inherit", "report", "wandb", "ema", "best"):
            cfg.train.pop(key, None)
    return cfg


def train(cfg: DictConfig, resume: bool = False) -> None:
    """Train, with distillation if the config has it.

    Args:
        cfg: the entries that Detectron2's tools/lazyconfig_train_net.py reads (model, dataloader, optimizer,
            lr_multiplier and train) and, if the model is distilled, train.matching: the arguments of
            :class:`MatchingUpdate`. It may have train.accumulate, the batches of a step, and train.non_finite, the
            arguments of :class:`NonFinitePolicy`, train.report, the keys of REPORT in small letters, train.wandb, the
            arguments of :class:`WandbWriter`, train.ema and train.best, the keyword arguments of :class:`EMAHook` and
            :class:`BestCheckpoint` (for these three, None is off), and train.inherit, the parts to inherit or all
            arguments of :func:`inherit_from_teacher`; the teacher is that of model.backbone.teacher if they name none.
            dataloader.matching, if it is there and not None, gives the batches of a "measured" matching in place of
            dataloader.train: the same images without augmentation, for example.
        resume: continue from the last checkpoint of train.output_dir.

    Raises:
        UserError: a value cannot be used, or the training failed in a way that the user can act on.
    """
    is_averaged, keeps_best, has_wandb = (cfg.train.get(key) is not None for key in ("ema", "best", "wandb"))
    if has_wandb:
        _check_arguments(WandbWriter, "train.wandb", cfg.train.wandb)
    if keeps_best and "evaluator" not in cfg.dataloader:
        raise UserError(
            f"train.best is {_plain(cfg.train.best)}, but there is no dataloader.evaluator to give a score: add one, "
            "or leave train.best out"
        )
    model = _build_model(cfg)
    logger.info(f"Model:\n{model}")
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = distributed(model, **cfg.train.ddp)
    policy = _made(NonFinitePolicy, "train.non_finite", cfg.train.get("non_finite", {}))
    with named_as(lambda argument: f"train.{argument}"):
        trainer = TrainStep(
            model,
            [],  # the data loader is built below, once the checkpoint's seed is known
            optimizer,
            accumulate=cfg.train.get("accumulate", 1),
            non_finite=policy,
            amp=cfg.train.amp.enabled,
        )
    checkpointer = TrainingCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    random_state = RandomState(cfg.train.get("seed", -1), trainer.batches_per_iteration)
    ema, period = None, cfg.train.eval_period
    if is_averaged:
        ema = _made(EMAHook, "train.ema", cfg.train.ema, checkpointer, cfg.train.max_iter)
    trainer.register_hooks(
        training_hooks(
            trainer,
            random_state=random_state,
            scheduler=instantiate(cfg.lr_multiplier),
            checkpoints=_made(CheckpointHook, "train.checkpointer", cfg.train.checkpointer, checkpointer),
            evaluation=EvaluationHook(period, lambda: evaluate_both(lambda: _test(cfg, model), ema)),
            build_writers=lambda: _writers(cfg),
            log_period=cfg.train.log_period,
            matching=_matching_hook(cfg, model) if is_distilled(cfg) else None,
            ema=ema,
            best=_made(BestCheckpoint, "train.best", cfg.train.best, checkpointer, period, ema) if keeps_best else None,
            report=ReportHook(lambda: lazy_run(cfg)) if lazy_report_options(cfg)["enabled"] else None,
        )
    )

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    if "inherit" in cfg.train and not checkpointer.resumed_from:
        build_batches = partial(_channel_batches, cfg)
        _made(inherit_from_teacher, "train.inherit", _inheritance(cfg), unwrapped(model), build_batches)
    with seeded(Purpose.ORDER, random_state.seed):
        trainer.data_loader = _train_loader(cfg)
    advice = (
        "Lower optimizer.lr or model.backbone.losses, or lengthen the warm-up of lr_multiplier; "
        "train.non_finite.policy=skip skips single steps."
    )
    with explained_training_errors(checkpointer, advice):
        # A checkpoint's iteration is the one that was finished last.
        trainer.train(trainer.iter + 1 if checkpointer.resumed_from else 0, cfg.train.max_iter)


def _channel_batches(cfg: DictConfig, image_format: str) -> Any:
    """Return the training set's loader with images of another format, if its mapper takes one."""
    cfg = copy.deepcopy(cfg)
    if OmegaConf.select(cfg, "dataloader.train.mapper.image_format") is not None:
        cfg.dataloader.train.mapper.image_format = image_format
    return _train_loader(cfg)


def _build_model(cfg: DictConfig) -> nn.Module:
    inherit = _plain(cfg.train.get("inherit", []))
    if is_distilled(cfg) and "inherits_fpn" not in cfg.model.backbone:
        parts, channels = inherit, {}
        if isinstance(inherit, dict):
            parts, channels = inherit.get("parts", []), inherit.get("channels", {})
        cfg.model.backbone.inherits_fpn = "fpn" in parts and channels.get("criterion") != NO_CRITERION
    node = cfg.model
    if is_distilled(cfg) and "teacher" in cfg.model.backbone:
        teacher = cfg.model.backbone.teacher

        def build_teacher() -> Any:
            # It draws random weights before it loads its own. The heads, which are built next, must start as they do
            # without distillation.
            with torch.random.fork_rng(devices=[]):
                return instantiate(teacher)

        node = copy.deepcopy(node)
        node.backbone.teacher = LazyCall(build_teacher)()
    with named_as(lambda argument: f"model.backbone.{argument}"):  # an argument of distilled_backbone
        return instantiate(node).to(cfg.train.device)


def _writers(cfg: DictConfig) -> List[EventWriter]:
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    if cfg.train.get("wandb") is not None:
        writers.append(_made(WandbWriter, "train.wandb", {**cfg.train.wandb, "folder": cfg.train.output_dir}))
    return writers


def _matching_hook(cfg: DictConfig, model: nn.Module) -> MatchingUpdate:
    if "matching" not in cfg.train:
        raise UserError(
            "train.matching is not in the config: give the arguments of MatchingUpdate, for example "
            "train.matching = dict(num_batches=1000, periods=[5000])"
        )
    _check_arguments(MatchingUpdate, "train.matching", cfg.train.matching)
    options = {
        "seed": max(cfg.train.get("seed", 0), 0),
        **cfg.train.matching,
        "record_folder": cfg.train.get("output_dir", ""),
    }

    def batches() -> Any:
        return _train_loader(cfg, "matching" if cfg.dataloader.get("matching") is not None else "train")

    return _made(MatchingUpdate, "train.matching", options, model, batches)


def _inheritance(cfg: DictConfig) -> Dict[str, Any]:
    """Return the arguments of :func:`inherit_from_teacher` that train.inherit and model.backbone.teacher give."""
    teacher = OmegaConf.select(cfg, "model.backbone.teacher")
    given = teacher if isinstance(teacher, DictConfig) and "config_file" in teacher else {}
    options = {key: _plain(given[key]) for key in ("config_file", "weights", "opts") if key in given}
    names = OmegaConf.select(cfg, "dataloader.train.dataset.names", default=[])
    options["datasets"] = [names] if isinstance(names, str) else list(names)
    options["seed"] = max(cfg.train.get("seed", 0), 0)
    inherit = _plain(cfg.train.inherit)
    return {**options, **(inherit if isinstance(inherit, dict) else {"parts": inherit})}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _made(make: Callable[..., Made], key: str, options: Mapping[str, Any], *arguments: Any) -> Made:
    """Return ``make(*arguments, **options)``; errors about an option name its entry of the config, under ``key``."""
    _check_arguments(make, key, options)
    try:
        inspect.signature(make).bind(*arguments, **options)
    except TypeError as e:
        raise UserError(f"{key} is {dict(options)}, which {make.__name__} does not take: {e}") from e
    with named_as(lambda argument: f"{key}.{argument}"):
        return make(*arguments, **options)


def _check_arguments(make: Callable[..., Any], key: str, options: Any) -> None:
    """Raise UserError if an entry of the config, which is to have arguments of ``make``, is no dict."""
    if not isinstance(options, (Mapping, DictConfig)):
        raise UserError(
            f"{key} is {options!r}; give a dict of the arguments of {make.__name__}, such as {key}.NAME=VALUE"
        )


def _train_loader(cfg: DictConfig, name: str = "train") -> Any:
    return instantiate(_replaced(cfg.dataloader[name], build_detection_train_loader, build_resumable_train_loader))


def _replaced(node: Any, original: Callable[..., Any], replacement: Callable[..., Any]) -> Any:
    """Make a node of the config call ``replacement`` if it calls ``original``."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if (locate(target) if isinstance(target, str) else target) is original:
        node._target_ = replacement
    return node


def evaluate(cfg: DictConfig, resume: bool = False) -> Any:
    """Evaluate the model with train.init_checkpoint, or with the last checkpoint of train.output_dir."""
    model = _build_model(cfg)
    load_for_evaluation(model, cfg.train.output_dir, cfg.train.init_checkpoint, "train.init_checkpoint", resume)
    return _test(cfg, model)


def _test(cfg: DictConfig, model: nn.Module) -> Any:
    if "evaluator" not in cfg.dataloader:
        return None
    evaluator = instantiate(_replaced(cfg.dataloader.evaluator, COCOEvaluator, FastCOCOEvaluator))
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results
