"""Detectron2's DefaultTrainer with distillation and COCO evaluation."""

import logging
import os
import weakref
from typing import Any, Dict, Iterable, List, Optional

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.config import MGD_BACKBONE
from mgd_det.data.mapper import CheckedMapper, SkippedImages, skipped_list
from mgd_det.engine.loss_normalizer import LossNormalizer
from mgd_det.engine.matching_hook import MatchingUpdate
from mgd_det.engine.messages import explained_training_errors

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
        model = create_ddp_model(model, broadcast_buffers=False)
        step = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = WeightsCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> List[Optional[HookBase]]:
        hooks = super().build_hooks()
        hooks.insert(2, LossNormalizer(self.model))
        if self.cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE:
            # Counted from the front, where all ranks have the same hooks: only rank 0 has a checkpointer.
            hooks.insert(2, self.build_matching_hook())
        return hooks

    def build_matching_hook(self) -> MatchingUpdate:
        cfg, build_train_loader = self.cfg, self.build_train_loader
        matching = cfg.MODEL.MGD.MATCHING
        return MatchingUpdate(
            self.model,
            lambda: build_train_loader(cfg),
            num_batches=matching.NUM_BATCHES,
            periods=matching.PERIODS,
            milestones=matching.MILESTONES,
            seed=max(cfg.SEED, 0),
        )

    def train(self) -> Any:
        advice = (
            "Lower SOLVER.BASE_LR or the weights of MODEL.MGD.LOSS, lengthen SOLVER.WARMUP_ITERS, or enable "
            "SOLVER.CLIP_GRADIENTS."
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
        return build_detection_train_loader(cfg, mapper=CheckedMapper(cfg, is_train=True))

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
