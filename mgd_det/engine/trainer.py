"""Detectron2's DefaultTrainer with distillation and COCO evaluation."""

import logging
import os
import weakref
from typing import Any, Dict, Iterable, List, Optional

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from torch import nn

from mgd_det.checkpoint import TrainingCheckpointer, WeightsCheckpointer
from mgd_det.config import MGD_BACKBONE
from mgd_det.data.mapper import CheckedMapper, SkippedImages, skipped_list
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

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains what the config describes; where its backbone is "build_mgd_backbone", with distillation.

    Entry "model" of its checkpoints is the plain student's.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # Not DefaultTrainer's, which has no seams: how ranks are joined, a step and the checkpoints are this project's.
        TrainerBase.__init__(self)
        cfg = scale_matching_schedule(cfg, comm.get_world_size())
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = distributed(model)
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            accumulate=cfg.SOLVER.ACCUMULATE,
            non_finite=NonFinitePolicy(cfg.SOLVER.NON_FINITE.POLICY, cfg.SOLVER.NON_FINITE.MAX_IN_A_ROW),
            amp=cfg.SOLVER.AMP.ENABLED,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = TrainingCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> List[Optional[HookBase]]:
        hooks = super().build_hooks()
        for i, hook in enumerate(hooks):
            if isinstance(hook, PeriodicCheckpointer):
                solver = self.cfg.SOLVER
                hooks[i] = CheckpointHook(self.checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINTS_KEPT)
            elif isinstance(hook, EvalHook):
                hooks[i] = EvaluationHook(self.cfg.TEST.EVAL_PERIOD, hook._func)
        # Counted from the front, where all ranks have the same hooks: only rank 0 has a checkpointer.
        hooks.insert(3, Interruption(self.checkpointer, self._trainer))
        hooks.insert(3, LossNormalizer(self.model))  # behind precise batch norm, whose forwards move it
        if self.cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE:
            hooks.insert(2, self.build_matching_hook())
        seed = getattr(self._trainer.data_loader, "seed", self.cfg.SEED)
        hooks.insert(0, RandomState(seed, self._trainer.batches_per_iteration))
        return hooks

    def resume_or_load(self, resume: bool = True) -> None:
        """Goes on after the last checkpoint of OUTPUT_DIR, or begins with MODEL.WEIGHTS."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed_from:
            self.start_iter = self.iter + 1  # a checkpoint's iteration is the one that was finished last

    def build_matching_hook(self) -> MatchingUpdate:
        cfg, build_train_loader = self.cfg.clone(), self.build_train_loader
        cfg.defrost()

        def build_loader() -> Iterable[List[Dict[str, Any]]]:
            cfg.SEED = comm.shared_random_seed()  # of the update's own seeded generators: not the training's images
            return build_train_loader(cfg)

        matching = cfg.MODEL.MGD.MATCHING
        return MatchingUpdate(
            self.model,
            build_loader,
            num_batches=matching.NUM_BATCHES,
            periods=matching.PERIODS,
            milestones=matching.MILESTONES,
            source=matching.SOURCE,
            seed=max(self.cfg.SEED, 0),
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        )

    def train(self) -> Any:
        advice = (
            "Lower SOLVER.BASE_LR or the weights of MODEL.MGD.LOSS, lengthen SOLVER.WARMUP_ITERS, or enable "
            "SOLVER.CLIP_GRADIENTS; SOLVER.NON_FINITE.POLICY skip leaves out single steps."
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
                f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)} has no image with an object to learn: give "
                "annotations that are no crowds, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train without any"
            ) from e

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[List[Dict[str, Any]]]:
        return build_detection_test_loader(cfg, dataset_name, mapper=CheckedMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))


def scale_matching_schedule(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Scales MODEL.MGD.MATCHING as SOLVER.REFERENCE_WORLD_SIZE makes Detectron2 scale the iterations.

    An update is measured on as many images, and falls on the same share of the training.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, num_workers):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    matching = cfg.MODEL.MGD.MATCHING
    for key in ("PERIODS", "MILESTONES"):
        matching[key] = [max(round(iterations * reference / num_workers), 1) for iterations in matching[key]]
    matching.NUM_BATCHES = max(round(matching.NUM_BATCHES * reference / num_workers), 1)
    cfg.freeze()
    return cfg


def load_and_test(cfg: CfgNode, resume: bool = False) -> Dict[str, Any]:
    """Evaluates the detector of ``cfg`` with MODEL.WEIGHTS, or with the last checkpoint of OUTPUT_DIR."""
    model: nn.Module = Trainer.build_model(cfg)
    checkpointer = WeightsCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return Trainer.test(cfg, model)
