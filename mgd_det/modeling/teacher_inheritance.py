"""From a config and a teacher's weights to a student that starts from them."""

import logging
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.config import merge_config
from mgd_det.data.coco.register import classes_of_json, classes_without_loading
from mgd_det.errors import named_as
from mgd_det.modeling.inheritance import InheritanceReport, check_parts, inherit
from mgd_det.modeling.teachers import require_weights, teacher_config

logger = logging.getLogger(__name__)

_KEY = "MODEL.MGD.INHERIT"


def check_inheritance(cfg: CfgNode) -> None:
    """Check ``MODEL.MGD.INHERIT`` before anything is built.

    Raises:
        UserError: a part is unknown, or ``MODEL.MGD.TEACHER`` does not describe a teacher.
    """
    with named_as(lambda _: _KEY):
        check_parts(cfg.MODEL.MGD.INHERIT)
    if cfg.MODEL.MGD.INHERIT:
        teacher_config(cfg)


def inherit_from_config(cfg: CfgNode, student: nn.Module) -> Optional[InheritanceReport]:
    """Give a detector what ``MODEL.MGD.INHERIT`` names of the teacher of ``MODEL.MGD.TEACHER``, and log a table.

    It also serves a student without distillation.

    Returns:
        None if the key is empty.

    Raises:
        UserError: the teacher's config or weights cannot be used, a part is unknown, or nothing fits.
    """
    parts = cfg.MODEL.MGD.INHERIT
    with named_as(lambda _: _KEY):
        check_parts(parts)
        if not parts:
            return None
        return _inherit(student, parts, teacher_config(cfg), _classes_of_sets(cfg.DATASETS.TRAIN))


def inherit_from_teacher(
    student: nn.Module,
    *,
    parts: Sequence[str],
    config_file: str,
    weights: str = "",
    opts: Sequence[Any] = (),
    datasets: Sequence[str] = (),
) -> InheritanceReport:
    """Do the same with keyword arguments.

    Args:
        student: a detector with its own weights.
        parts: see ``MODEL.MGD.INHERIT``.
        config_file: see the keys of ``MODEL.MGD.TEACHER``.
        weights: see ``MODEL.MGD.TEACHER``.
        opts: see ``MODEL.MGD.TEACHER``.
        datasets: names of the student's training sets, whose classes are compared with the teacher's.

    Raises:
        ArgumentError: a part is unknown, or nothing fits.
        UserError: the teacher's config or weights cannot be used.
    """
    check_parts(parts)
    cfg = merge_config("", [])
    teacher = cfg.MODEL.MGD.TEACHER
    teacher.CONFIG_FILE, teacher.WEIGHTS, teacher.OPTS = config_file, weights, list(opts)
    return _inherit(student, parts, teacher_config(cfg), _classes_of_sets(datasets))


def _inherit(
    student: nn.Module, parts: Sequence[str], teacher_cfg: CfgNode, classes: Optional[List[str]]
) -> InheritanceReport:
    theirs = _classes_of(teacher_cfg)
    same_classes = classes is None or theirs is None or classes == theirs
    report = inherit(student, teacher_tensors(teacher_cfg), parts, same_classes=same_classes)
    lines = [f"The student starts from these tensors of its teacher ({', '.join(parts)}):", str(report)]
    empty = report.empty_parts(parts)
    if empty:
        lines.append(f"Nothing was inherited of: {', '.join(empty)}")
    logger.log(logging.WARNING if empty else logging.INFO, "\n".join(lines))
    return report


def teacher_tensors(teacher_cfg: CfgNode) -> Dict[str, Tensor]:
    """Return the tensors of a trained detector by name, on the CPU: those that its MODEL.WEIGHTS have.

    The global random generator does not change.

    Raises:
        UserError: the config names no weights, or they are not of this detector.
    """
    weights = teacher_cfg.MODEL.WEIGHTS
    require_weights(weights)
    with torch.random.fork_rng(devices=[]):
        # Not build_model, which would move it to MODEL.DEVICE.
        detector = META_ARCH_REGISTRY.get(teacher_cfg.MODEL.META_ARCHITECTURE)(teacher_cfg)
    checkpointer = WeightsCheckpointer(detector)
    checkpointer.load(weights)
    unset = set(checkpointer.unset_keys)  # random
    return {name: value for name, value in detector.state_dict().items() if name not in unset}


def _classes_of(cfg: CfgNode) -> Optional[List[str]]:
    """Return the names of the classes that a detector was trained on, or None if they are not known here."""
    path = cfg.DATASETS.COCO_FOLDER.TRAIN_JSON
    # With a folder, its DATASETS.TRAIN has the name that the student's own folder has as well.
    return classes_of_json(path) if path else _classes_of_sets(cfg.DATASETS.TRAIN)


def _classes_of_sets(names: Sequence[str]) -> Optional[List[str]]:
    """Return the class names of the first data set, or None if they are not known without loading it."""
    return classes_without_loading(names[0]) if names else None
