"""From command line to config: Detectron2's flags, and those of this project."""

import argparse
import logging
import os
from typing import List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from mgd_det.cli.data_setup import check_datasets, check_proposal_files, use_coco_folders
from mgd_det.config import MGD_BACKBONE, merge_config, plain_student_config, without_distillation
from mgd_det.distributed.processes import add_launch_flags
from mgd_det.distributed.torchrun import resume_after_restart
from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import add_unsafe_files_flag
from mgd_det.model_zoo import find_config_file
from mgd_det.modeling.pretrained_teacher import teacher_config

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's parser with the flags for a data set in COCO format, for the teacher and for the processes."""
    parser = default_argument_parser()
    add_launch_flags(parser)
    data = parser.add_argument_group("a data set in COCO format, instead of the config's (DATASETS.COCO_FOLDER)")
    data.add_argument("--train-json", metavar="FILE", help="annotations to train on")
    data.add_argument("--train-images", metavar="DIR", help="folder of their images")
    data.add_argument("--val-json", metavar="FILE", help="annotations to evaluate on")
    data.add_argument("--val-images", metavar="DIR", help="folder of their images")
    add_unsafe_files_flag(parser)
    parser.add_argument(
        "--eval-teacher", action="store_true", help="evaluate the teacher of MODEL.MGD.TEACHER, then stop"
    )
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a run, checked against the machine and the data; starts logging to OUTPUT_DIR.

    Raises UserError for what the user has to mend.
    """
    cfg = read_config(args.config_file, args.opts)
    _set_coco_folder(cfg, args)
    use_coco_folders(cfg)
    check_proposal_files(cfg)
    if args.eval_teacher:
        if cfg.MODEL.BACKBONE.NAME != MGD_BACKBONE:
            raise UserError(f"--eval-teacher: {args.config_file} has no teacher; give a config with distillation")
        cfg = _evaluated_as_teacher(cfg)
    elif args.eval_only:
        cfg = without_distillation(cfg)  # needs no teacher
    warning = use_available_device(cfg)
    _start_logging(cfg)  # before the check of the data, which logs what it skips
    restart = resume_after_restart(args, cfg.OUTPUT_DIR)
    check_datasets(cfg, train=not (args.eval_only or args.eval_teacher), resume=args.resume)
    cfg.freeze()
    try:
        default_setup(cfg, _with_path(args))
    except OSError as e:
        raise UserError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written: {e}") from e
    for remark in filter(None, (warning, restart)):
        logger.warning(remark)
    if cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE and comm.is_main_process():
        save_student_config(cfg)
    return cfg


def read_config(config_file: str, opts: Optional[List[str]] = None) -> CfgNode:
    """The config of a file (a path or a name of a model zoo; "" for the defaults) with overrides, not frozen."""
    return merge_config(find_config_file(config_file) if config_file else "", opts or [], config_file)


def use_available_device(cfg: CfgNode) -> str:
    """Turns MODEL.DEVICE from a GPU that is not there to "cpu". Returns a warning of it, or ""."""
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return ""
    warning = (
        f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but this machine has no GPU that torch can use: running on the CPU."
    )
    cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED:
        cfg.SOLVER.AMP.ENABLED = False
        warning += " SOLVER.AMP needs a GPU and is off."
    return warning


def save_student_config(cfg: CfgNode) -> str:
    """Writes student.yaml: the plain student without any key of this project, for plain Detectron2.

    Returns its path, beside config.yaml. The keys of a student of this project stay, where it is used.
    """
    plain = plain_student_config(cfg)
    plain.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    path = os.path.join(cfg.OUTPUT_DIR, "student.yaml")
    with PathManager.open(path, "w") as f:
        f.write(plain.dump())
    return path


def _evaluated_as_teacher(cfg: CfgNode) -> CfgNode:
    teacher = teacher_config(cfg)
    if not teacher.MODEL.WEIGHTS:
        raise UserError("--eval-teacher: MODEL.MGD.TEACHER.WEIGHTS is empty and the teacher's config names no weights")
    teacher.DATASETS = cfg.DATASETS.clone()
    teacher.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    teacher.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "teacher")
    return teacher


def _set_coco_folder(cfg: CfgNode, args: argparse.Namespace) -> None:
    """The flags win over the keys that they stand for."""
    for flag in ("train_json", "train_images", "val_json", "val_images"):
        if getattr(args, flag):
            cfg.DATASETS.COCO_FOLDER[flag.upper()] = getattr(args, flag)


def _start_logging(cfg: CfgNode) -> None:
    try:
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="mgd_det")
    except OSError as e:
        raise UserError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written: {e}") from e


def _with_path(args: argparse.Namespace) -> argparse.Namespace:
    """``default_setup`` prints the file: give it the path that a model-zoo name stands for."""
    path = find_config_file(args.config_file) if args.config_file else ""
    return argparse.Namespace(**{**vars(args), "config_file": path})
