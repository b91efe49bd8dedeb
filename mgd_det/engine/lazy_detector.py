"""The trained detector of a LazyConfig, with what a yaml config says of its images in a config of yaml's keys."""

from typing import Any, Sequence, Tuple

from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from mgd_det.config import class_head, merge_config
from mgd_det.engine.lazy_config import read_config, target_name
from mgd_det.engine.lazy_trainer import student_config
from mgd_det.errors import UserError


def read_lazy_detector(config_file: str, weights: str, opts: Sequence[str], flag: str) -> Tuple[CfgNode, DictConfig]:
    """Return what a LazyConfig says of images, data sets and weights, and the node that builds the plain detector.

    Args:
        config_file: a LazyConfig, in Python or as yaml.
        weights: those of the detector; "" for train.init_checkpoint.
        opts: overrides, KEY=VALUE...
        flag: the flag that names the config, for the errors.

    Returns:
        The defaults of all yaml configs, in which these keys are the LazyConfig's: INPUT.FORMAT, MIN_SIZE_TEST and
        MAX_SIZE_TEST, DATASETS.TRAIN and TEST (those that are registered), MODEL.WEIGHTS, DEVICE, META_ARCHITECTURE,
        MASK_ON, KEYPOINT_ON and the number of classes, TEST.DETECTIONS_PER_IMAGE. And "model" of the LazyConfig,
        without distillation.

    Raises:
        UserError: the config cannot be read, or does not say what the detector needs.
    """
    for opt in opts:
        if "=" not in opt:
            raise UserError(
                f"the override {opt!r} is not KEY=VALUE, as {flag} {config_file} needs it, since it is a LazyConfig "
                "(train.init_checkpoint=model_final.pth names weights)"
            )
    lazy = student_config(read_config(config_file, opts, flag))
    model = lazy.model
    cfg = merge_config("", [])
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = _image_rule(lazy, f"{flag} {config_file}")
    for key, split in (("TRAIN", "train"), ("TEST", "test")):
        names = OmegaConf.select(lazy, f"dataloader.{split}.dataset.names", default=None) or ()
        names = (names,) if isinstance(names, str) else tuple(names)
        cfg.DATASETS[key] = tuple(name for name in names if name in DatasetCatalog)
    cfg.MODEL.WEIGHTS = weights or lazy.train.get("init_checkpoint") or ""
    if not cfg.MODEL.WEIGHTS:
        raise UserError(
            f"{flag} {config_file} names no weights: give train.init_checkpoint=FILE, that of the trained detector"
        )
    cfg.MODEL.DEVICE = lazy.train.get("device", cfg.MODEL.DEVICE)
    cfg.MODEL.META_ARCHITECTURE = target_name(model)
    heads = model.get("roi_heads") or {}
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = "mask_head" in heads, "keypoint_head" in heads
    class_head(cfg).NUM_CLASSES = model.num_classes if "num_classes" in model else heads.get("num_classes", 0)
    return cfg, model


def _image_rule(lazy: DictConfig, config: str) -> Tuple[int, int, str]:
    """Return INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST and FORMAT of the mapper of dataloader.test."""
    key = "dataloader.test.mapper"
    mapper = OmegaConf.select(lazy, key)
    if not isinstance(mapper, DictConfig) or "augmentations" not in mapper or "image_format" not in mapper:
        raise UserError(
            f"{config} has no {key} with augmentations and image_format, which say how large and of what channel order "
            "the images of the detector are"
        )
    augmentations: Any = instantiate(mapper.augmentations)
    if not augmentations:
        return 0, 0, mapper.image_format  # images keep their size
    resize = augmentations[0]
    sides = set(resize.short_edge_length) if isinstance(resize, T.ResizeShortestEdge) else set()
    if len(augmentations) > 1 or len(sides) != 1 or resize.interp != Image.Resampling.BILINEAR:
        raise UserError(
            f"{key}.augmentations of {config} is {[str(a) for a in augmentations]}: only one bilinear "
            "ResizeShortestEdge to one size can be exported and predicted with, or an empty list for images that keep "
            "their size"
        )
    return int(sides.pop()), int(resize.max_size), mapper.image_format
