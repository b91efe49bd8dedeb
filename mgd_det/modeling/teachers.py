"""From a config and a detector's weights to the network that teaches."""

import dataclasses
from typing import Any, Sequence

import detectron2.model_zoo
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.config import head_loss_keys, merge_config, without_distillation
from mgd_det.distillation import PixelFormat, TeacherNetwork, TeacherOptions
from mgd_det.errors import UserError, named_as
from mgd_det.model_zoo import find_config_file, is_detectron2_zoo_config


def build_teacher(cfg: CfgNode) -> TeacherNetwork:
    """Build the teacher of ``MODEL.MGD.TEACHER``, with its weights, on the CPU.

    It is the whole detector if a loss (:data:`HEAD_LOSSES`) or ``MODEL.MGD.LOSS.MASK`` needs its heads, otherwise its
    backbone.

    Raises:
        UserError: the config or the weights are missing, or an option has a wrong value.
    """
    teacher_cfg = teacher_config(cfg)
    build = build_backbone
    if head_loss_keys(cfg) or cfg.MODEL.MGD.LOSS.MASK.NAME == "scores":
        # Not build_model, which would move it to MODEL.DEVICE: the teacher follows the student.
        build = META_ARCH_REGISTRY.get(teacher_cfg.MODEL.META_ARCHITECTURE)
    return pretrained_teacher(
        build(teacher_cfg),
        teacher_cfg.MODEL.WEIGHTS,
        PixelFormat.from_config(teacher_cfg),
        allow_unset=cfg.MODEL.MGD.TEACHER.ALLOW_UNSET,
        options=teacher_options(cfg),
    )


def named_teacher(
    *,
    config_file: str,
    weights: str = "",
    opts: Sequence[Any] = (),
    allow_unset: Sequence[str] = (),
    whole_detector: bool = False,
    options: TeacherOptions = TeacherOptions(),  # noqa: B008  (immutable)
) -> TeacherNetwork:
    """Build the teacher of a yaml config, on the CPU: ``MODEL.MGD.TEACHER`` by keyword arguments.

    The global random generator does not change, so that the student starts with the same weights as without a
    teacher. For a teacher without a yaml config, use :func:`pretrained_teacher`.

    Args:
        config_file: see the keys of ``MODEL.MGD.TEACHER``.
        weights: see ``MODEL.MGD.TEACHER``.
        opts: see ``MODEL.MGD.TEACHER``.
        allow_unset: see ``MODEL.MGD.TEACHER``.
        whole_detector: build its heads too, for the losses that need them and for a mask of scores.
        options: how it computes.

    Raises:
        UserError: as :func:`build_teacher`.
    """
    cfg = merge_config("", [])
    teacher = cfg.MODEL.MGD.TEACHER
    teacher.CONFIG_FILE, teacher.WEIGHTS = config_file, weights
    teacher.OPTS, teacher.ALLOW_UNSET = list(opts), list(allow_unset)
    for field in dataclasses.fields(options):
        teacher[field.name.upper()] = getattr(options, field.name)
    cfg.MODEL.MGD.LOGITS.WEIGHT = float(whole_detector)
    with torch.random.fork_rng(devices=[]):
        return build_teacher(cfg)


def pretrained_teacher(
    network: nn.Module,
    weights: str,
    pixels: PixelFormat,
    allow_unset: Sequence[str] = (),
    options: TeacherOptions = TeacherOptions(),  # noqa: B008  (immutable)
) -> TeacherNetwork:
    """Load a detector's weights into a network that is to teach: for LazyConfig, without a cfg.

    Args:
        network: a detector's backbone, or the whole detector (for its heads).
        weights: path or URL of the detector's checkpoint.
        pixels: the input that the detector was trained with.
        allow_unset: prefixes of names of the detector's tensors that ``weights`` may lack.
        options: how it computes.

    Raises:
        UserError: no weights are given, or they are not a detector's. A single tensor that is needed and left unset
            is an error later, when the positions are known.
    """
    require_weights(weights)
    detector = network
    if not hasattr(network, "backbone"):
        detector = nn.Module()
        detector.backbone = network
    checkpointer = WeightsCheckpointer(detector)
    checkpointer.load(weights)
    unset = [name for name in checkpointer.unset_keys if not name.startswith(tuple(allow_unset))]
    backbone = detector.get_submodule("backbone")
    above = [f"backbone.{name}" for name, _ in backbone.named_parameters() if not name.startswith("bottom_up.")]
    if hasattr(backbone, "bottom_up") and above and set(above) <= set(unset):
        # Such are the WEIGHTS of a config, an ImageNet classifier with which its own training began.
        raise UserError(
            f"the teacher's weights {weights} have no tensor of its FPN, so they are not a trained detector's. Set "
            "MODEL.MGD.TEACHER.WEIGHTS to the trained detector's; to let a classifier teach, set "
            'MODEL.MGD.TEACHER.ALLOW_UNSET ["backbone."].'
        )
    return TeacherNetwork(network, pixels, tuple(unset), options)


def teacher_options(cfg: CfgNode) -> TeacherOptions:
    """Return how the teacher of ``MODEL.MGD.TEACHER`` computes.

    Raises:
        UserError: an option has a wrong value.
    """
    names = [field.name for field in dataclasses.fields(TeacherOptions)]
    with named_as(lambda argument: f"MODEL.MGD.TEACHER.{argument.upper()}"):
        return TeacherOptions(**{name: cfg.MODEL.MGD.TEACHER[name.upper()] for name in names})


def teacher_config(cfg: CfgNode) -> CfgNode:
    """Return the config of the plain detector that ``MODEL.MGD.TEACHER`` describes, with its MODEL.WEIGHTS."""
    teacher = cfg.MODEL.MGD.TEACHER
    name = teacher.CONFIG_FILE
    if not name:
        raise UserError(
            "MODEL.MGD.TEACHER.CONFIG_FILE is empty: name the teacher's config, a path or a name in Detectron2's "
            "model zoo such as COCO-Detection/retinanet_R_50_FPN_1x.yaml"
        )
    path = find_config_file(name, "MODEL.MGD.TEACHER.CONFIG_FILE")
    teacher_cfg = merge_config(path, teacher.OPTS, f"{name} of MODEL.MGD.TEACHER")
    teacher_cfg = without_distillation(teacher_cfg)
    teacher_cfg.MODEL.WEIGHTS = teacher.WEIGHTS or trained_weights(name, teacher_cfg)
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    return teacher_cfg


def trained_weights(name: str, cfg: CfgNode) -> str:
    """Return the weights of a trained detector: of Detectron2's model zoo for its configs, else MODEL.WEIGHTS.

    Args:
        name: a path, or a name of a model zoo.
        cfg: the config of this name.

    Raises:
        UserError: Detectron2's model zoo has no weights for its config.
    """
    if not is_detectron2_zoo_config(name):
        return cfg.MODEL.WEIGHTS
    try:
        return detectron2.model_zoo.get_checkpoint_url(name)
    except RuntimeError as e:
        raise UserError(
            f"Detectron2's model zoo has no trained weights for {name}: set MODEL.MGD.TEACHER.WEIGHTS"
        ) from e


def require_weights(weights: str) -> None:
    """Check that a teacher has weights.

    Raises:
        UserError: ``weights`` is "".
    """
    if not weights:
        raise UserError(
            "MODEL.MGD.TEACHER.WEIGHTS is empty and the teacher's config names no weights: "
            "give the checkpoint of the trained teacher"
        )
