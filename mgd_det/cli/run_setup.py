"""The parts of a run's set-up that yaml configs and LazyConfigs share."""

import argparse
import copy
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from mgd_det.distributed.ranks import on_main_process
from mgd_det.files.folder_lock import lock_folder
from mgd_det.files.outputs import writing
from mgd_det.model_zoo import find_config_file


def warning_without_gpu(device_key: str, device: str, amp_key: str, amp: bool) -> str:
    """Return a warning if the config asks for a GPU and there is none, otherwise "".

    Args:
        device_key, device: key and value of the config's device.
        amp_key, amp: key and value of its mixed precision, which needs a GPU.
    """
    if not device.startswith("cuda") or torch.cuda.is_available():
        return ""
    warning = f"{device_key} is {device!r}, but this machine has no GPU that torch can use: running on the CPU."
    return warning + (f" {amp_key} needs a GPU and is off." if amp else "")


def lock_output(key: str, folder: str) -> None:
    """Keep other trainings out of the output folder, which the config's ``key`` names. Collective.

    Raises:
        UserError: another training uses the folder, or it cannot be written.
    """
    on_main_process(lambda: lock_folder(folder, key))


def log_folder(args: argparse.Namespace, folder: str) -> str:
    """Return the folder for log.txt and config.yaml: the output folder, or its "inference" with ``--eval-only``.

    An evaluation must not replace the config.yaml of the training whose weights it scores, which may still run.
    """
    return os.path.join(folder, "inference") if args.eval_only else folder


def start_logging(key: str, folder: str) -> None:
    """Start this project's log in the output folder, which the config's ``key`` names, or in a folder of it.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(folder, key):
        setup_logger(folder, distributed_rank=comm.get_rank(), name="mgd_det")


def set_up_detectron2(cfg: Any, args: argparse.Namespace, key: str, folder: str, lazy: bool = False) -> None:
    """Call Detectron2's ``default_setup``, which logs the environment and the config and sets the seed.

    Args:
        folder: for log.txt and config.yaml; see :func:`log_folder`.
        lazy: whether ``cfg`` is a LazyConfig.

    Raises:
        UserError: the output folder cannot be written.
    """
    # It prints the config file, so it needs the path behind a name of a model zoo.
    path = find_config_file(args.config_file, lazy=lazy) if args.config_file else ""
    with writing(folder, key):
        default_setup(_with_output_folder(cfg, folder), argparse.Namespace(**{**vars(args), "config_file": path}))


def _with_output_folder(cfg: Any, folder: str) -> Any:
    cfg = copy.deepcopy(cfg)
    if isinstance(cfg, CfgNode):
        cfg.defrost()
        cfg.OUTPUT_DIR = folder
        cfg.freeze()
    else:
        cfg.train.output_dir = folder
    return cfg
