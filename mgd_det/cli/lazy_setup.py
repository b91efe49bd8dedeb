"""From command line to LazyConfig: what :mod:`mgd_det.cli.yaml_setup` is for yaml."""

import argparse
import logging
import os
from typing import Any, List, Tuple

import torch
import yaml
from detectron2.config import LazyConfig
from detectron2.data import DatasetMapper
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from mgd_det.cli.lazy_yaml import load_lazy_yaml
from mgd_det.data import CheckedMapper, check_dataset, dataset_classes, register_coco_folder
from mgd_det.distributed.torchrun import resume_after_restart
from mgd_det.engine.lazy_trainer import is_distilled, student_config
from mgd_det.errors import UserError
from mgd_det.model_zoo import find_config_file

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> DictConfig:
    """The config of a run, checked against the machine and the data; starts logging to train.output_dir.

    Raises UserError for what the user has to mend.
    """
    cfg = read_config(args.config_file, args.opts)
    if args.eval_teacher:
        raise UserError("--eval-teacher: tools/train_net.py scores teachers, by the yaml config of this name")
    _use_coco_flags(cfg, args)
    plain = student_config(cfg)
    if args.eval_only:
        cfg = plain  # needs no teacher
    warning = _use_available_device(cfg)
    restart = resume_after_restart(args, cfg.train.output_dir)
    _check_data(cfg, train=not args.eval_only)
    args.config_file = find_config_file(args.config_file, lazy=True)  # default_setup prints the file
    try:
        default_setup(cfg, args)
    except OSError as e:
        raise UserError(f"train.output_dir {cfg.train.output_dir} cannot be written: {e}") from e
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mgd_det")
    for remark in filter(None, (warning, restart)):
        logger.warning(remark)
    if is_distilled(cfg) and comm.is_main_process():
        plain.train.init_checkpoint = os.path.join(cfg.train.output_dir, "model_final.pth")
        LazyConfig.save(plain, os.path.join(cfg.train.output_dir, "student.yaml"))
    for split in ("train", "test"):  # not in student.yaml, which names nothing of this project
        mapper = OmegaConf.select(cfg, f"dataloader.{split}.mapper")
        if mapper is not None and mapper._target_ is DatasetMapper:
            mapper._target_ = CheckedMapper
    return cfg


def read_config(name: str, opts: List[str]) -> DictConfig:
    """The LazyConfig of a path or of a name of a model zoo, with overrides."""
    path = find_config_file(name, lazy=True)
    try:
        cfg = LazyConfig.load(path) if path.endswith(".py") else load_lazy_yaml(path)
    except (SyntaxError, ValueError, OSError, yaml.YAMLError, UserError) as e:
        raise UserError(f"--config-file {name}: {e.__cause__ or e}") from e
    missing = {"model", "dataloader", "optimizer", "lr_multiplier", "train"} - set(cfg)
    if missing:
        hint = " It is a yaml config, which tools/train_net.py takes." if "MODEL" in cfg or "_BASE_" in cfg else ""
        raise UserError(f"--config-file {name} is no LazyConfig of a training: it lacks {', '.join(missing)}.{hint}")
    for opt in opts:
        try:
            LazyConfig.apply_overrides(cfg, [opt])
        except Exception as e:  # the parser, OmegaConf and Detectron2 each have their own
            reason = str(e).splitlines()[0]
            raise UserError(f"the override {opt!r} cannot be applied, give KEY=VALUE of the config: {reason}") from e
    return cfg


def _use_available_device(cfg: DictConfig) -> str:
    """Turns train.device from a GPU that is not there to "cpu". Returns a warning of it, or ""."""
    if not cfg.train.device.startswith("cuda") or torch.cuda.is_available():
        return ""
    warning = (
        f"train.device is {cfg.train.device!r}, but this machine has no GPU that torch can use: running on the CPU."
    )
    cfg.train.device = "cpu"
    if cfg.train.amp.enabled:
        cfg.train.amp.enabled = False
        warning += " train.amp needs a GPU and is off."
    return warning


def _use_coco_flags(cfg: DictConfig, args: argparse.Namespace) -> None:
    for split in ("train", "val"):
        json_file, images = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if bool(json_file) != bool(images):
            raise UserError(f"--{split}-json and --{split}-images go together: give both or none")
        if json_file:
            name = f"coco_folder_{split}"
            _class_head(cfg).num_classes = len(register_coco_folder(name, json_file, images))
            cfg.dataloader["test" if split == "val" else "train"].dataset.names = name
    if args.train_json and args.val_json:
        train, val = dataset_classes("coco_folder_train"), dataset_classes("coco_folder_val")
        if train != val:
            raise UserError(f"--val-json has other categories than --train-json: {val} instead of {train}")


def _class_head(cfg: DictConfig) -> Any:
    """The node with the num_classes that the detector's other parts refer to."""
    return cfg.model if "num_classes" in cfg.model else cfg.model.roi_heads


def _check_data(cfg: DictConfig, train: bool) -> None:
    masks = ("segmentation",) if "mask_head" in cfg.model.get("roi_heads", {}) else ()
    polygons: Tuple[str, ...] = ()
    if masks and OmegaConf.select(cfg, "dataloader.train.mapper.instance_mask_format", default="polygon") == "polygon":
        polygons = ("polygons",)
    for split, keys in (("train", (*masks, *polygons)), ("test", (*masks, "area", "iscrowd"))):
        names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
        if names is None or (split == "train" and not train):
            continue
        for name in [names] if isinstance(names, str) else names:
            check_dataset(name, keys)
            classes, expected = dataset_classes(name), _class_head(cfg).num_classes
            # To train, the config may have classes to spare; the evaluator knows the data's classes only.
            if classes is not None and (len(classes) > expected or (split == "test" and len(classes) < expected)):
                raise UserError(
                    f"{name} has {len(classes)} classes, but the config's num_classes is {expected}: set it to "
                    f"{len(classes)}, or use weights and data of the same classes"
                )
