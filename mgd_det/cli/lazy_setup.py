"""Read a LazyConfig and the flags of the command line, as :mod:`mgd_det.cli.yaml_setup` does for yaml."""

import argparse
import logging
import os
from typing import Any, Dict, List, Optional, Tuple

from detectron2.config import LazyConfig
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from mgd_det.cli.data_setup import OTHER_CLASSES_LEARNED, learned_classes
from mgd_det.cli.run_setup import lock_output, log_folder, set_up_detectron2, start_logging, warning_without_gpu
from mgd_det.config import HEAD_LOSSES, merge_config
from mgd_det.data import CheckedMapper, check_dataset, dataset_classes, register_coco_folder
from mgd_det.data.categories import save_categories
from mgd_det.data.class_names import check_same_classes, check_scorable_classes, class_names
from mgd_det.data.coco.keypoints import (
    Keypoints,
    check_number_of_keypoints,
    check_same_keypoints,
    check_sigmas,
    keypoints_of,
    register_keypoints,
    require_names,
)
from mgd_det.data.coco.register import classes_without_loading
from mgd_det.engine.lazy_config import is_distilled, read_config
from mgd_det.engine.lazy_trainer import student_config
from mgd_det.errors import UserError
from mgd_det.files.student_files import STUDENT_CONFIG, student_weights
from mgd_det.model_zoo import find_config_file

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> DictConfig:
    """Read the config of a run, check it against the machine and the data, and start logging to train.output_dir.

    Raises:
        UserError: the config, the machine or the data have an error that the user can fix.
    """
    cfg = read_config(args.config_file, args.opts)
    if args.eval_teacher:
        raise UserError("--eval-teacher: tools/train_net.py scores teachers, by the yaml config of this name")
    _use_coco_flags(cfg, args)
    plain = student_config(cfg)
    if args.eval_only:
        cfg = plain  # needs no teacher
    warning = _use_available_device(cfg)
    _check_data(cfg, train=not args.eval_only)
    _check_evaluator(cfg)
    if not args.eval_only:
        lock_output("train.output_dir", cfg.train.output_dir)
    folder = log_folder(args, cfg.train.output_dir)
    set_up_detectron2(cfg, args, "train.output_dir", folder, lazy=True)
    start_logging("train.output_dir", folder)
    if warning:
        logger.warning(warning)
    if is_distilled(cfg) and comm.is_main_process():
        plain.train.init_checkpoint = student_weights(cfg.train.output_dir)
        path = os.path.join(cfg.train.output_dir, STUDENT_CONFIG)
        LazyConfig.save(plain, path)
        logger.info(
            f"Wrote the plain student's config to {path}. As every LazyConfig in yaml it names the functions to call: "
            "tools/lazyconfig_train_net.py reads it with --allow-unsafe-files"
        )
    if not args.eval_only and comm.is_main_process():
        save_categories(_dataset_names(cfg, "train"), cfg.train.output_dir)
    for split in ("train", "test"):  # not in student.yaml, which names nothing of this project
        mapper = OmegaConf.select(cfg, f"dataloader.{split}.mapper")
        if mapper is not None and mapper._target_ is DatasetMapper:
            mapper._target_ = CheckedMapper
    return cfg


def _use_available_device(cfg: DictConfig) -> str:
    """Set train.device to "cpu" if there is no GPU; return a warning about it, or ""."""
    warning = warning_without_gpu("train.device", cfg.train.device, "train.amp", cfg.train.amp.enabled)
    if warning:
        cfg.train.device, cfg.train.amp.enabled = "cpu", False
    return warning


def _use_coco_flags(cfg: DictConfig, args: argparse.Namespace) -> None:
    classes: Dict[str, Optional[List[str]]] = {}
    for split in ("train", "val"):
        json_file, images = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if bool(json_file) != bool(images):
            raise UserError(f"--{split}-json and --{split}-images go together: give both or neither")
        if json_file:
            name = f"coco_folder_{split}"
            _class_head(cfg).num_classes = len(register_coco_folder(name, json_file, images))
            cfg.dataloader["test" if split == "val" else "train"].dataset.names = name
            classes[json_file] = dataset_classes(name)
    # Both in one group, as even a class that is missing at the end is more likely a slip than meant.
    check_same_classes(classes, {})


def _check_evaluator(cfg: DictConfig) -> None:
    """Check that the evaluator's data set is the single one that is tested."""
    evaluator, names = cfg.dataloader.get("evaluator"), OmegaConf.select(cfg, "dataloader.test.dataset.names")
    if names is None or not isinstance(evaluator, DictConfig) or "dataset_name" not in evaluator:
        return
    tested, scored = [names] if isinstance(names, str) else list(names), evaluator.dataset_name
    if tested != [scored]:
        raise UserError(
            f"dataloader.evaluator.dataset_name is {scored}, but dataloader.test.dataset.names is {names}: an "
            "evaluator scores one data set, so give both the same single name"
        )


def _class_head(cfg: DictConfig) -> Any:
    """Return the node whose num_classes the other parts of the detector refer to."""
    return cfg.model if "num_classes" in cfg.model else cfg.model.roi_heads


def _check_data(cfg: DictConfig, train: bool) -> None:
    masks = ("segmentation",) if "mask_head" in cfg.model.get("roi_heads", {}) else ()
    polygons: Tuple[str, ...] = ()
    if masks and OmegaConf.select(cfg, "dataloader.train.mapper.instance_mask_format", default="polygon") == "polygon":
        polygons = ("polygons",)
    points = ("keypoints",) if "keypoint_head" in cfg.model.get("roi_heads", {}) else ()
    keypoints: Dict[str, Keypoints] = {}
    classes: Dict[str, Dict[str, Optional[List[str]]]] = {"train": {}, "test": {}}
    for split, keys in (("train", (*masks, *polygons, *points)), ("test", (*masks, *points, "area", "iscrowd"))):
        for name in _dataset_names(cfg, split):
            key = f"dataloader.{split}.dataset.names {name}"
            if split == "train" and not train:
                known = classes_without_loading(name)
                # Weights cannot be from a set with another number of classes.
                classes[split][key] = known if known and len(known) == _class_head(cfg).num_classes else None
                continue
            check_dataset(name, keys)
            classes[split][key] = class_names(name)
            _check_number_of_classes(cfg, name, classes[split][key], evaluated=split == "test")
            if points:
                keypoints[key] = _check_keypoints(cfg, name, trained=split == "train")
            if split == "test" and "evaluator" in cfg.dataloader:
                check_scorable_classes(name, "dataloader.test.dataset.names")
    check_same_classes(classes["train"], classes["test"])
    check_same_keypoints(keypoints)
    teaches_heads = is_distilled(cfg) and any(cfg.model.backbone.get(name) for name in HEAD_LOSSES)
    if train and teaches_heads and "config_file" in cfg.model.backbone.teacher:
        teacher = cfg.model.backbone.teacher
        path = find_config_file(teacher.config_file, "model.backbone.teacher.config_file")
        opts: Any = OmegaConf.to_container(OmegaConf.create(teacher.get("opts", [])))
        learned = learned_classes(merge_config(path, opts, path), " of the teacher's config")
        check_same_classes(classes["train"], learned, OTHER_CLASSES_LEARNED)


def _check_keypoints(cfg: DictConfig, name: str, trained: bool) -> Keypoints:
    """Check the keypoints of one data set, and use them to mirror the images if the config does not say how."""
    number_key = "model.roi_heads.keypoint_head.num_keypoints"
    number, keypoints = cfg.model.roi_heads.keypoint_head.num_keypoints, keypoints_of(name)
    check_number_of_keypoints(name, keypoints, number_key, number)
    register_keypoints(name, keypoints)
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper")
    if not trained:
        sigmas = OmegaConf.select(cfg, "dataloader.evaluator.kpt_oks_sigmas", default=())
        if "evaluator" in cfg.dataloader:
            check_sigmas("dataloader.evaluator.kpt_oks_sigmas", list(sigmas), number_key, number)
    elif mapper is not None and "use_keypoint" in mapper:
        indices = mapper.get("keypoint_hflip_indices")
        # Those of Detectron2's configs are COCO's, which a set of the flags does not have.
        if keypoints.names and (name == "coco_folder_train" or indices is None or len(indices) != number):
            mapper.keypoint_hflip_indices = create_keypoint_hflip_indices(name)
        elif indices is None or len(indices) != number:
            require_names(name, keypoints)
    return keypoints


def _check_number_of_classes(cfg: DictConfig, name: str, classes: Optional[List[str]], evaluated: bool) -> None:
    expected = _class_head(cfg).num_classes
    # For training, the config may have more classes than the data; the evaluator knows the data's classes only.
    if classes is not None and (len(classes) > expected or (evaluated and len(classes) < expected)):
        raise UserError(
            f"{name} has {len(classes)} classes, but the config's num_classes is {expected}: set it to "
            f"{len(classes)}, or use weights and data of the same classes"
        )


def _dataset_names(cfg: DictConfig, split: str) -> List[str]:
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
    return [names] if isinstance(names, str) else list(names or ())
