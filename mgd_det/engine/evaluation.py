"""Choose the evaluators of a yaml config's data sets, as Detectron2's tools/train_net.py does."""

import importlib.util
import logging
import os
from functools import partial
from typing import Callable, Dict, List

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.data.class_names import check_scorable_classes
from mgd_det.data.coco.keypoints import check_sigmas
from mgd_det.engine.coco_evaluator import FastCOCOEvaluator
from mgd_det.errors import UserError

logger = logging.getLogger(__name__)

# Detections per image that each benchmark scores; a config may keep more.
_COCO_DETECTIONS, _LVIS_DETECTIONS = 100, 300

# Modules that an evaluator imports only when it runs, and the package that has each.
_PACKAGES = {"lvis": "lvis", "cityscapesscripts": "cityscapesScripts", "panopticapi": "panopticapi"}


def build_evaluator(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Build the evaluator of a data set, by the ``evaluator_type`` of its metadata ("coco" where it has none).

    Args:
        cfg: the detector's config. AP counts TEST.DETECTIONS_PER_IMAGE detections, but never fewer than the benchmark.
        name: the data set's name.
        folder: where the predictions are written.

    Raises:
        UserError: this detector cannot be scored on this set, or a package is missing.
    """
    made = [make() for make in _evaluators(cfg, name, folder)]
    return made[0] if len(made) == 1 else DatasetEvaluators(made)


def evaluation_folder(cfg: CfgNode, name: str, kind: str = "inference") -> str:
    """Return the folder for predictions on a set of DATASETS.TEST; each of several sets has its own."""
    return os.path.join(cfg.OUTPUT_DIR, kind, *([name] if len(cfg.DATASETS.TEST) > 1 else []))


def check_evaluation(cfg: CfgNode) -> None:
    """Check before training that the detector can be scored as the config asks.

    Raises:
        UserError: a set of DATASETS.TEST or a key of TEST does not fit the detector.
    """
    for name in cfg.DATASETS.TEST:
        _evaluators(cfg, name)
        if not _is_kind(cfg, SemanticSegmentor):
            check_scorable_classes(name)
    if cfg.TEST.BEST.METRIC and not cfg.DATASETS.TEST:
        raise UserError(
            f"TEST.BEST.METRIC is {cfg.TEST.BEST.METRIC!r}, but DATASETS.TEST is empty: name a set to evaluate on, or "
            'set TEST.BEST.METRIC ""'
        )
    if cfg.TEST.AUG.ENABLED:
        if not _is_kind(cfg, GeneralizedRCNN) or _is_kind(cfg, PanopticFPN):
            raise UserError(
                f"TEST.AUG.ENABLED is True, but MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: Detectron2's "
                "test-time augmentation is for GeneralizedRCNN (Faster and Mask R-CNN) only. Set TEST.AUG.ENABLED False"
            )
        for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
            if cfg.MODEL[key]:
                raise UserError(
                    f"TEST.AUG.ENABLED and MODEL.{key} are True, which Detectron2's test-time augmentation cannot do "
                    "together. Set TEST.AUG.ENABLED False"
                )
    sigmas, keypoints = cfg.TEST.KEYPOINT_OKS_SIGMAS, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if sigmas and not cfg.MODEL.KEYPOINT_ON:
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS is {sigmas}, but MODEL.KEYPOINT_ON is False: set it to [], or use a "
            "keypoint detector"
        )
    if cfg.MODEL.KEYPOINT_ON and (cfg.DATASETS.TEST or sigmas):
        check_sigmas("TEST.KEYPOINT_OKS_SIGMAS", sigmas, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", keypoints)


def load_for_evaluation(model: nn.Module, folder: str, weights: str, key: str, resume: bool) -> None:
    """Load the weights to evaluate; warn if there are none.

    Args:
        folder: the folder of the checkpoints.
        weights: loaded without ``resume``, or if the folder has no checkpoint.
        key: the config key of ``weights``.
        resume: load the last checkpoint of the folder.
    """
    checkpointer = WeightsCheckpointer(model, save_dir=folder)
    if not weights and not (resume and checkpointer.has_checkpoint()):
        logger.warning(
            f"{key} is empty: the scores are those of RANDOM WEIGHTS. Set {key} to a checkpoint, or give --resume to "
            f"evaluate the last one of {folder}."
        )
    checkpointer.resume_or_load(weights, resume=resume)


def _evaluators(cfg: CfgNode, name: str, folder: str = "") -> List[Callable[[], DatasetEvaluator]]:
    """Return functions that build the evaluators of a set, without reading the set.

    Raises:
        UserError: this detector cannot be scored on this set, or a package is missing.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
    is_panoptic, has_instances = _is_kind(cfg, PanopticFPN), not _is_kind(cfg, SemanticSegmentor)
    detections = cfg.TEST.DETECTIONS_PER_IMAGE
    coco = partial(
        FastCOCOEvaluator,
        name,
        output_dir=folder,
        use_fast_impl=cfg.TEST.FAST_EVAL,
        # Any other number than 100 takes pycocotools' slower implementation.
        max_dets_per_image=detections if detections > _COCO_DETECTIONS else None,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )
    instances: Dict[str, Callable[[], DatasetEvaluator]] = {
        "coco": coco,
        "coco_panoptic_seg": coco,
        "lvis": partial(LVISEvaluator, name, output_dir=folder, max_dets_per_image=max(detections, _LVIS_DETECTIONS)),
        "pascal_voc": partial(PascalVOCDetectionEvaluator, name),
        "cityscapes_instance": partial(CityscapesInstanceEvaluator, name),
    }
    segmentation: Dict[str, Callable[[], DatasetEvaluator]] = {
        "coco_panoptic_seg": partial(SemSegEvaluator, name, output_dir=folder),
        "sem_seg": partial(SemSegEvaluator, name, output_dir=folder),
        "cityscapes_sem_seg": partial(CityscapesSemSegEvaluator, name),
    }
    made = [segmentation[kind]] if (is_panoptic or not has_instances) and kind in segmentation else []
    if has_instances and kind in instances:
        made.append(instances[kind])
    needed = {"lvis": "lvis", "cityscapes_instance": "cityscapesscripts", "cityscapes_sem_seg": "cityscapesscripts"}
    package = needed.get(kind, "")
    if kind == "coco_panoptic_seg" and is_panoptic:
        made.append(partial(COCOPanopticEvaluator, name, folder))
        package = "panopticapi"
    advice = 'use another set, or DATASETS.TEST "()" to train without evaluation'
    if not made or (kind == "cityscapes_instance" and not cfg.MODEL.MASK_ON):
        raise UserError(
            f"DATASETS.TEST {name}: no evaluator scores {cfg.MODEL.META_ARCHITECTURE} (MODEL.MASK_ON "
            f"{cfg.MODEL.MASK_ON}) on a set of evaluator_type {kind!r}: {advice}"
        )
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"DATASETS.TEST {name} has the evaluator_type {kind!r}, whose scores need the package {package}: "
            f"`pip install {_PACKAGES[package]}`, {advice}"
        )
    return made


def _is_kind(cfg: CfgNode, kind: type) -> bool:
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(architecture, type) and issubclass(architecture, kind)
