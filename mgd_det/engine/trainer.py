"""Detectron2's DefaultTrainer with distillation and COCO evaluation."""

import logging
import weakref
from functools import partial
from typing import Any, Dict, Iterable, List, Optional

import yaml
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import PreciseBN
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.config import MGD_BACKBONE
from mgd_det.data.mapper import CheckedMapper, SkippedImages, skipped_list
from mgd_det.data.resumable_loader import build_resumable_train_loader
from mgd_det.distributed.ranks import distributed
from mgd_det.engine.evaluation import build_evaluator, check_evaluation, evaluation_folder, load_for_evaluation
from mgd_det.engine.hooks.best_checkpoint import BestCheckpoint
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.ema import EMAHook, evaluate_both
from mgd_det.engine.hooks.evaluation import EvaluationHook
from mgd_det.engine.hooks.matching_update import MatchingUpdate
from mgd_det.engine.hooks.precise_bn import StudentPreciseBN, student_batch_norms
from mgd_det.engine.hooks.random_state import RandomState
from mgd_det.engine.hooks.report import ReportHook
from mgd_det.engine.last_iteration import EndsAtMaxIter
from mgd_det.engine.non_finite import NonFinitePolicy
from mgd_det.engine.run_report import yaml_run
from mgd_det.engine.training_errors import explained_training_errors
from mgd_det.engine.training_hooks import training_hooks
from mgd_det.engine.training_step import TrainStep
from mgd_det.engine.wandb_writer import WandbWriter
from mgd_det.errors import UserError, named_as
from mgd_det.modeling import check_inheritance, inherit_from_config, unwrapped
from mgd_det.modeling.teacher_inheritance import channel_batches

logger = logging.getLogger(__name__)


_CHECKPOINT_KEYS = {"period": "SOLVER.CHECKPOINT_PERIOD", "max_to_keep": "SOLVER.CHECKPOINTS_KEPT"}


class Trainer(EndsAtMaxIter, DefaultTrainer):
    """Trains what the config describes; with distillation if its backbone is "build_mgd_backbone".

    Entry "model" of its checkpoints is the plain student's.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own constructor does not let us choose the step, the checkpointer and how ranks are joined.
        TrainerBase.__init__(self)
        check_evaluation(cfg)
        check_inheritance(cfg)
        cfg = scale_own_schedules(cfg, comm.get_world_size())
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = distributed(model)
        solver = cfg.SOLVER
        with named_as(lambda argument: f"SOLVER.NON_FINITE.{argument.upper()}"):
            policy = NonFinitePolicy(solver.NON_FINITE.POLICY, solver.NON_FINITE.MAX_IN_A_ROW)
        with named_as(lambda argument: f"SOLVER.{argument.upper()}"):
            self._trainer = TrainStep(
                model,
                data_loader,
                optimizer,
                accumulate=solver.ACCUMULATE,
                non_finite=policy,
                amp=solver.AMP.ENABLED,
            )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = TrainingCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> List[HookBase]:
        cfg = self.cfg
        with named_as(_CHECKPOINT_KEYS.__getitem__):
            checkpoints = CheckpointHook(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_KEPT)
        seed = getattr(self._trainer.data_loader, "seed", cfg.SEED)
        ema = self._build_ema() if cfg.SOLVER.EMA.ENABLED else None
        return training_hooks(
            self._trainer,
            random_state=RandomState(seed, self._trainer.batches_per_iteration),
            checkpoints=checkpoints,
            evaluation=EvaluationHook(cfg.TEST.EVAL_PERIOD, lambda: self._evaluate(ema)),
            build_writers=self.build_writers,
            matching=self.build_matching_hook() if cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE else None,
            precise_bn=self._build_precise_bn(),
            ema=ema,
            best=self._build_best(ema) if cfg.TEST.BEST.METRIC else None,
            report=ReportHook(lambda: yaml_run(cfg)) if cfg.REPORT.ENABLED else None,
        )

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint of OUTPUT_DIR, or start from MODEL.WEIGHTS and MODEL.MGD.INHERIT."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed_from:
            self.start_iter = self.iter + 1  # a checkpoint's iteration is the one that was finished last
        else:
            build_batches = partial(channel_batches, self.cfg, self.build_train_loader)
            inherit_from_config(self.cfg, unwrapped(self.model), build_batches)

    def build_matching_hook(self) -> MatchingUpdate:
        cfg, build_train_loader = self.cfg.clone(), self.build_train_loader
        cfg.defrost()

        def build_loader() -> Iterable[List[Dict[str, Any]]]:
            # Drawn from the update's own generators, so its images are not those of the training.
            cfg.SEED = comm.shared_random_seed()
            return build_train_loader(cfg)

        # KINDS is the distiller's.
        options = {key.lower(): value for key, value in cfg.MODEL.MGD.MATCHING.items() if key != "KINDS"}
        with named_as(lambda argument: f"MODEL.MGD.MATCHING.{argument.upper()}"):
            return MatchingUpdate(
                self.model, build_loader, seed=max(cfg.SEED, 0), record_folder=cfg.OUTPUT_DIR, **options
            )

    def build_writers(self) -> List[EventWriter]:
        """Return Detectron2's writers, and that of WANDB if it is on."""
        writers, wandb = DefaultTrainer.build_writers(self), self.cfg.WANDB
        if wandb.ENABLED:
            config = yaml.safe_load(self.cfg.dump())
            writers.append(WandbWriter(wandb.PROJECT, wandb.NAME, folder=self.cfg.OUTPUT_DIR, config=config))
        return writers

    def _build_ema(self) -> EMAHook:
        options = self.cfg.SOLVER.EMA
        with named_as(lambda argument: f"SOLVER.EMA.{argument.upper()}"):
            return EMAHook(self.checkpointer, self.max_iter, decay=options.DECAY, start=options.START)

    def _build_best(self, ema: Optional[EMAHook]) -> BestCheckpoint:
        with named_as(lambda argument: f"TEST.BEST.{argument.upper()}"):
            return BestCheckpoint(self.checkpointer, self.cfg.TEST.EVAL_PERIOD, ema, metric=self.cfg.TEST.BEST.METRIC)

    def _build_precise_bn(self) -> Optional[PreciseBN]:
        if not (self.cfg.TEST.PRECISE_BN.ENABLED and student_batch_norms(self.model)):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # it runs rarely
        loader = self.build_train_loader(cfg)
        return StudentPreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)

    def _evaluate(self, ema: Optional[EMAHook]) -> Dict[str, Any]:
        results = evaluate_both(self._scores, ema)
        self._last_eval_results = results  # which DefaultTrainer.train() verifies
        return results

    def _scores(self) -> Dict[str, Any]:
        results = self.test(self.cfg, self.model)
        if self.cfg.TEST.AUG.ENABLED and self.iter >= self.max_iter:  # only at the end, because it is slow
            results.update(self.test_with_tta(self.cfg, self.model))
        return results

    def train(self) -> Any:
        advice = (
            "Lower SOLVER.BASE_LR or the weights of MODEL.MGD.LOSS, lengthen SOLVER.WARMUP_ITERS, or enable "
            "SOLVER.CLIP_GRADIENTS; SOLVER.NON_FINITE.POLICY skip skips single steps."
        )
        with explained_training_errors(self.checkpointer, advice):
            try:
                return super().train()
            finally:
                self._log_skipped_images()

    def _log_skipped_images(self) -> None:
        if self.cfg.DATASETS.BROKEN_INPUT != "skip" or not comm.is_main_process():
            return
        path = skipped_list(self.cfg)
        count = len(SkippedImages(path).read())
        if count:
            logger.warning(f"Broken images skipped in training: {count}; they are listed in {path}")

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[List[Dict[str, Any]]]:
        try:
            return build_resumable_train_loader(cfg, mapper=CheckedMapper(cfg, is_train=True))
        except AssertionError as e:
            if "No valid data" not in str(e):
                raise
            raise UserError(
                f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)} has no image with an object to learn: add "
                "annotations other than crowds, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train without any"
            ) from e

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[List[Dict[str, Any]]]:
        return build_detection_test_loader(cfg, dataset_name, mapper=CheckedMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder or evaluation_folder(cfg, dataset_name))

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> Dict[str, Any]:
        """Evaluate with Detectron2's test-time augmentation (TEST.AUG). The names of the scores end in "_TTA"."""
        logger.info("Running inference with test-time augmentation ...")
        evaluators = [
            cls.build_evaluator(cfg, name, evaluation_folder(cfg, name, "inference_TTA")) for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": scores for name, scores in results.items()}


def scale_own_schedules(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Scale MODEL.MGD and SOLVER.EMA as SOLVER.REFERENCE_WORLD_SIZE makes Detectron2 scale the iterations.

    A matching update then uses as many images, after the same share of the training. Distillation ends, and the average
    of weights starts and reaches back, after the same share, too.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, num_workers):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    factor, matching, ema = reference / num_workers, cfg.MODEL.MGD.MATCHING, cfg.SOLVER.EMA
    for key in ("PERIODS", "MILESTONES"):
        matching[key] = [max(round(iterations * factor), 1) for iterations in matching[key]]
    matching.NUM_BATCHES = max(round(matching.NUM_BATCHES * factor), 1)
    if cfg.MODEL.MGD.STOP_ITER > 0:  # 0: to the end
        cfg.MODEL.MGD.STOP_ITER = max(round(cfg.MODEL.MGD.STOP_ITER * factor), 1)
    start, last = round(ema.START * factor), max(round(cfg.SOLVER.MAX_ITER * factor) - 1, 0)
    ema.START = min(start, last) if ema.START < cfg.SOLVER.MAX_ITER else start  # rounding must not pass the end
    ema.DECAY = 1 - (1 - ema.DECAY) / factor if 1 - ema.DECAY < factor else ema.DECAY
    cfg.freeze()
    return cfg


def load_and_test(cfg: CfgNode, resume: bool = False) -> Dict[str, Any]:
    """Evaluate the detector of ``cfg`` with MODEL.WEIGHTS, or with the last checkpoint of OUTPUT_DIR.

    With TEST.AUG.ENABLED, it is evaluated a second time, with test-time augmentation.
    """
    check_evaluation(cfg)
    model: nn.Module = Trainer.build_model(cfg)
    load_for_evaluation(model, cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_tta(cfg, model))
    return results
