"""Read a yaml config and the flags of the command line: Detectron2's and those of this project."""

import argparse
import logging
import os
from typing import Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from mgd_det.cli.data_setup import check_datasets, check_proposal_files, learned_classes, use_coco_folders
from mgd_det.cli.run_setup import lock_output, log_folder, set_up_detectron2, start_logging, warning_without_gpu
from mgd_det.config import MGD_BACKBONE, head_loss_keys, merge_config, plain_student_config, without_distillation
from mgd_det.data.categories import save_categories
from mgd_det.distributed.processes import add_launch_flags
from mgd_det.errors import UserError
from mgd_det.files.student_files import STUDENT_CONFIG, student_weights
from mgd_det.files.unsafe_files import add_unsafe_files_flag
from mgd_det.model_zoo import find_config_file
from mgd_det.modeling.teachers import teacher_config

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's parser with more flags: a data set in COCO format, the teacher, and processes."""
    parser = default_argument_parser()
    add_launch_flags(parser)
    add_data_flags(parser, "a data set in COCO format, instead of the config's (DATASETS.COCO_FOLDER)")
    add_unsafe_files_flag(parser)
    parser.add_argument(
        "--eval-teacher", action="store_true", help="evaluate the teacher of MODEL.MGD.TEACHER, then stop"
    )
    return parser


def add_data_flags(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Add the flags of a data set in COCO format as a group of this title, and return the group."""
    data = parser.add_argument_group(title)
    data.add_argument("--train-json", metavar="FILE", help="annotations to train on")
    data.add_argument("--train-images", metavar="DIR", help="folder of their images")
    data.add_argument("--val-json", metavar="FILE", help="annotations to evaluate on")
    data.add_argument("--val-images", metavar="DIR", help="folder of their images")
    return data


def coco_folder_of(args: argparse.Namespace) -> Dict[str, str]:
    """Return the keys of DATASETS.COCO_FOLDER that the data flags give, with absolute paths.

    config.yaml then names the data wherever it is read.
    """
    flags = ("train_json", "train_images", "val_json", "val_images")
    given = {flag.upper(): getattr(args, flag) for flag in flags if getattr(args, flag)}
    return {key: path if "://" in path else os.path.abspath(path) for key, path in given.items()}


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config of a run, check it against the machine and the data, and start logging to OUTPUT_DIR.

    Returns:
        The frozen config.

    Raises:
        UserError: the config, the machine or the data have an error that the user can fix.
    """
    cfg = read_config(args.config_file, args.opts)
    cfg.DATASETS.COCO_FOLDER.update(coco_folder_of(args))
    use_coco_folders(cfg)
    check_proposal_files(cfg)
    learned: Dict[str, Optional[List[str]]] = {}
    if args.eval_teacher:
        if cfg.MODEL.BACKBONE.NAME != MGD_BACKBONE:
            raise UserError(f"--eval-teacher: {args.config_file} has no teacher; give a config with distillation")
        cfg, learned = _evaluated_as_teacher(cfg)
    elif args.eval_only:
        cfg = without_distillation(cfg)  # needs no teacher
        learned = learned_classes(cfg)
    elif cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE and head_loss_keys(cfg):
        learned = learned_classes(teacher_config(cfg), " of the teacher's config")
    warning = use_available_device(cfg)
    is_training = not (args.eval_only or args.eval_teacher)
    if is_training:  # before anything is written; an evaluation may score what another process trains
        lock_output("OUTPUT_DIR", cfg.OUTPUT_DIR)
    folder = log_folder(args, cfg.OUTPUT_DIR)
    start_logging("OUTPUT_DIR", folder)  # before the check of the data, which logs what it skips
    check_datasets(cfg, train=is_training, resume=args.resume, learned=learned)
    cfg.freeze()
    set_up_detectron2(cfg, args, "OUTPUT_DIR", folder)
    if warning:
        logger.warning(warning)
    if cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE and comm.is_main_process():
        save_student_config(cfg)
    if is_training and comm.is_main_process():
        save_categories(cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR)
    return cfg


def read_config(config_file: str, opts: Optional[List[str]] = None) -> CfgNode:
    """Read the config of a file (a path or a name of a model zoo; "" for the defaults) with overrides, not frozen."""
    return merge_config(find_config_file(config_file) if config_file else "", opts or [], config_file)


def use_available_device(cfg: CfgNode) -> str:
    """Set MODEL.DEVICE to "cpu" if there is no GPU; return a warning about it, or ""."""
    warning = warning_without_gpu("MODEL.DEVICE", cfg.MODEL.DEVICE, "SOLVER.AMP", cfg.SOLVER.AMP.ENABLED)
    if warning:
        cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = "cpu", False
    return warning


def use_folder_of_training(cfg: CfgNode, config_file: str, opts: Sequence[str]) -> None:
    """Set OUTPUT_DIR to the folder of the config's file if a training wrote to it, and no override names another.

    It may have been moved or copied since, or be named relative to another folder.
    """
    if "OUTPUT_DIR" in opts:
        return
    beside = os.path.dirname(os.path.abspath(config_file))
    if any(os.path.isfile(os.path.join(beside, name)) for name in ("metrics.json", "last_checkpoint")):
        cfg.OUTPUT_DIR = beside


def save_student_config(cfg: CfgNode) -> str:
    """Write the plain student's config for plain Detectron2, student.yaml beside config.yaml, and return its path.

    It has no key of this project, unless the student itself is one of this project's. It names the weights by their
    absolute path, for plain Detectron2; this project finds them beside it wherever the two files are.
    """
    plain = plain_student_config(cfg)
    plain.MODEL.WEIGHTS = student_weights(cfg.OUTPUT_DIR)
    path = os.path.join(cfg.OUTPUT_DIR, STUDENT_CONFIG)
    with PathManager.open(path, "w") as f:
        f.write(plain.dump())
    return path


def _evaluated_as_teacher(cfg: CfgNode) -> Tuple[CfgNode, Dict[str, Optional[List[str]]]]:
    """Return the config that evaluates the teacher on the student's data, and the classes that it has learned."""
    teacher = teacher_config(cfg)
    if not teacher.MODEL.WEIGHTS:
        raise UserError("--eval-teacher: MODEL.MGD.TEACHER.WEIGHTS is empty and the teacher's config names no weights")
    learned = learned_classes(teacher, " of the teacher's config")
    teacher.DATASETS = cfg.DATASETS.clone()
    if teacher.MODEL.KEYPOINT_ON and cfg.TEST.KEYPOINT_OKS_SIGMAS:  # they are the data's
        teacher.TEST.KEYPOINT_OKS_SIGMAS = cfg.TEST.KEYPOINT_OKS_SIGMAS
    teacher.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    teacher.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "teacher")
    return teacher, learned
