"""A teacher by the name of its config, for LazyConfig."""

from typing import Any, Sequence

import torch
from detectron2.config import get_cfg

from mgd_det.config import add_mgd_config
from mgd_det.distillation import Teacher
from mgd_det.modeling.teacher import build_teacher


def named_teacher(
    *,
    config_file: str,
    weights: str = "",
    opts: Sequence[Any] = (),
    allow_unset: Sequence[str] = (),
    whole_detector: bool = False,
) -> Teacher:
    """The frozen teacher of a yaml config, on the CPU: what ``MODEL.MGD.TEACHER`` describes, by keyword arguments.

    It draws no number from the global generator, so that a student which is built next starts as it does without
    a teacher. A teacher that has no yaml config is built by :func:`pretrained_teacher`.

    Args:
        config_file, weights, opts, allow_unset: see the keys of ``MODEL.MGD.TEACHER``.
        whole_detector: build its heads too, for the distillation of logits.

    Raises UserError as :func:`build_teacher`.
    """
    cfg = get_cfg()
    add_mgd_config(cfg)
    teacher = cfg.MODEL.MGD.TEACHER
    teacher.CONFIG_FILE, teacher.WEIGHTS = config_file, weights
    teacher.OPTS, teacher.ALLOW_UNSET = list(opts), list(allow_unset)
    cfg.MODEL.MGD.LOGITS.WEIGHT = float(whole_detector)
    with torch.random.fork_rng(devices=[]):
        return build_teacher(cfg)
