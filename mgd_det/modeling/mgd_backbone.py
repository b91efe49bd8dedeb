"""Building a student's backbone with distillation, from arguments or a config."""

from typing import Any, Callable, Dict, Mapping, Optional

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from mgd_det.config import HEAD_LOSSES, MGD_BACKBONE
from mgd_det.distillation import POSITION_LOSS_REGISTRY, PixelFormat, TeacherNetwork
from mgd_det.errors import ArgumentError, UserError, check_choice, named_as
from mgd_det.modeling.injection import Distillation
from mgd_det.modeling.narrowing import NO_CRITERION
from mgd_det.modeling.teachers import build_teacher

# The name of the child that distillation adds to the student's backbone.
CHILD = "mgd"


@configurable(from_config=lambda cfg, input_shape: arguments_from_config(cfg, input_shape))
def distilled_backbone(*, student: Backbone, **options: Any) -> Backbone:
    """Inject distillation into ``student`` and return it, with a child ``mgd`` (:class:`Distillation`).

    Args:
        student: the student's backbone, with or without an FPN.
        options: the keyword arguments of :class:`Distillation`.

    Raises:
        ArgumentError: a position that one of the nets lacks, maps of different size, or a wrong value.
        UserError: the teacher's weights leave a tensor unset that the positions need.

    Example:
        >>> teacher = named_teacher(config_file="COCO-Detection/retinanet_R_50_FPN_1x.yaml")
        >>> detector.backbone = distilled_backbone(
        ...     student=detector.backbone, teacher=teacher, pixels=PixelFormat.from_config(cfg)
        ... )
        >>> attach_losses(detector)
    """
    if hasattr(student, CHILD):
        raise ArgumentError("student", f"has a child or attribute {CHILD!r} already: give a plain backbone")
    student.add_module(CHILD, Distillation(student, **options).train(student.training))
    return student


def arguments_from_config(
    cfg: CfgNode, input_shape: ShapeSpec, make_teacher: Optional[Callable[[CfgNode], TeacherNetwork]] = None
) -> Dict[str, Any]:
    """Return the keyword arguments of :func:`distilled_backbone` that ``MODEL.MGD`` describes, with the student built.

    Args:
        make_teacher: builds the teacher instead of :func:`build_teacher`; benchmarks give one that needs no weights.
    """
    mgd = cfg.MODEL.MGD
    if mgd.STUDENT_BACKBONE not in BACKBONE_REGISTRY or mgd.STUDENT_BACKBONE == MGD_BACKBONE:
        names = sorted(name for name, _ in BACKBONE_REGISTRY if name != MGD_BACKBONE)
        raise UserError(f"MODEL.MGD.STUDENT_BACKBONE is {mgd.STUDENT_BACKBONE!r}; use one of {', '.join(names)}")
    student = BACKBONE_REGISTRY.get(mgd.STUDENT_BACKBONE)(cfg, input_shape)
    # The teacher draws random weights before it loads its own. The heads, which are built next, must start as they do
    # without distillation.
    with torch.random.fork_rng(devices=[]):
        teacher = (make_teacher or build_teacher)(cfg)
    return {
        "student": student,
        "teacher": teacher,
        "pixels": PixelFormat.from_config(cfg),
        "positions": mgd.POSITIONS,
        "reducer": mgd.REDUCER,
        "margin": mgd.MARGIN,
        "norm": mgd.NORM,
        "norm_groups": mgd.NORM_GROUPS,
        "losses": {name: _loss_options(mgd.LOSS, name) for name in mgd.LOSS.NAMES},
        "pixel_mask": _lower_keys(mgd.LOSS.MASK) if mgd.LOSS.MASK.NAME else None,
        **{name: _lower_keys(mgd[name.upper()]) if mgd[name.upper()].WEIGHT != 0 else None for name in HEAD_LOSSES},
        "matchings": mgd.MATCHING.KINDS,
        "inherits_fpn": "fpn" in mgd.INHERIT and mgd.INHERIT_CHANNELS.CRITERION != NO_CRITERION,
        "interval": mgd.INTERVAL,
        "stop_iter": mgd.STOP_ITER,
    }


def config_key(argument: str) -> str:
    """Return the key of an argument of :func:`distilled_backbone`: MODEL.MGD.LOSS.L2.SCALE of "losses.l2.scale"."""
    if argument in ("pixels", "matchings"):
        return {"pixels": "INPUT.FORMAT", "matchings": "MODEL.MGD.MATCHING.KINDS"}[argument]
    first, _, rest = argument.partition(".")
    if first == "pixel_mask":
        first, rest = "loss", ".".join(filter(None, ["mask", rest]))
    if first == "losses":
        first, rest = "loss", rest or "names"
    return ".".join(["MODEL.MGD", first.upper(), *filter(None, [rest.upper()])])


@BACKBONE_REGISTRY.register()
def build_mgd_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the backbone ``MODEL.MGD.STUDENT_BACKBONE``, distilled as ``MODEL.MGD`` says."""
    with named_as(config_key):
        return distilled_backbone(cfg, input_shape)


def _loss_options(node: CfgNode, name: str) -> Dict[str, Any]:
    with named_as(config_key):
        check_choice("losses", name, [known for known, _ in POSITION_LOSS_REGISTRY])
        if list(node.NAMES).count(name) > 1:
            raise ArgumentError("losses", f"names {name!r} more than once")
    return _lower_keys(node.get(name.upper(), {}))


def _lower_keys(node: Mapping[str, Any]) -> Dict[str, Any]:
    return {key.lower(): value for key, value in node.items()}
