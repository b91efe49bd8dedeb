"""From a config and a teacher's weights to a student that starts from them."""

import dataclasses
import logging
from functools import partial
from itertools import islice
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.config import merge_config
from mgd_det.data.coco.register import classes_of_json, classes_without_loading
from mgd_det.data.mapper import CheckedMapper
from mgd_det.data.resumable_loader import build_resumable_train_loader
from mgd_det.distributed.ranks import on_main_process
from mgd_det.errors import ArgumentError, UserError, check_options, named_as
from mgd_det.modeling.channel_layout import FPN_OUTPUTS, channel_layout
from mgd_det.modeling.factorising import factorised_layers
from mgd_det.modeling.inheritance import InheritanceReport, check_parts, inherit
from mgd_det.modeling.injection import find_distillation
from mgd_det.modeling.narrowing import NO_CRITERION, Narrowed, NarrowingOptions, narrow, narrower_sets
from mgd_det.modeling.teachers import require_weights, teacher_config
from mgd_det.seeding import Purpose, seeded

logger = logging.getLogger(__name__)

# Makes the batches of Detectron2's inputs on which channels are measured, with images of the given INPUT.FORMAT.
BuildBatches = Callable[[str], Iterable[Any]]


def _key(argument: str) -> str:
    first, _, rest = argument.partition(".")
    return "MODEL.MGD.INHERIT" if first == "parts" else f"MODEL.MGD.INHERIT_CHANNELS.{(rest or first).upper()}"


def check_inheritance(cfg: CfgNode) -> None:
    """Check ``MODEL.MGD.INHERIT`` and ``MODEL.MGD.INHERIT_CHANNELS`` before anything is built.

    Raises:
        UserError: a key has a wrong value, or ``MODEL.MGD.TEACHER`` does not describe a teacher.
    """
    with named_as(_key):
        check_parts(cfg.MODEL.MGD.INHERIT)
        _narrowing_options(cfg)
    if cfg.MODEL.MGD.INHERIT:
        teacher_config(cfg)


def inherit_from_config(
    cfg: CfgNode, student: nn.Module, build_batches: Optional[BuildBatches] = None
) -> Optional[InheritanceReport]:
    """Give a detector what ``MODEL.MGD.INHERIT`` names of the teacher of ``MODEL.MGD.TEACHER``, and log a table.

    It also serves a student without distillation. Collective if the student is narrower than the teacher.

    Args:
        student: a detector with its own weights.
        build_batches: makes the batches on which the channels of a narrower student are chosen, of images in the format
            that it is given; as many as ``MODEL.MGD.INHERIT_CHANNELS.NUM_BATCHES`` are read, on rank 0. Default: a
            loader of DATASETS.TRAIN.

    Returns:
        None if the key is empty.

    Raises:
        UserError: the teacher's config or weights cannot be used, a key has a wrong value, or nothing fits.
    """
    parts = cfg.MODEL.MGD.INHERIT
    with named_as(_key):
        check_parts(parts)
        if not parts:
            return None
        options, seed = _narrowing_options(cfg), max(cfg.SEED, 0)
        classes = _classes_of_sets(cfg.DATASETS.TRAIN)
        build = build_batches or partial(channel_batches, cfg, _train_loader)
        return _inherit(student, parts, teacher_config(cfg), classes, options, build, seed)


def channel_batches(
    cfg: CfgNode, build_train_loader: Callable[[CfgNode], Iterable[Any]], image_format: str
) -> Iterable[Any]:
    """Return batches of the training set to choose a narrower student's channels on.

    Args:
        build_train_loader: makes the loader of a config.
        image_format: the teacher's INPUT.FORMAT.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT, cfg.SEED = image_format, max(cfg.SEED, 0)
    return build_train_loader(cfg)


def _train_loader(cfg: CfgNode) -> Iterable[Any]:
    return build_resumable_train_loader(cfg, mapper=CheckedMapper(cfg, is_train=True))


def _narrowing_options(cfg: CfgNode) -> NarrowingOptions:
    return NarrowingOptions(**{key.lower(): value for key, value in cfg.MODEL.MGD.INHERIT_CHANNELS.items()})


def inherit_from_teacher(
    student: nn.Module,
    build_batches: Optional[BuildBatches] = None,
    *,
    parts: Sequence[str],
    config_file: str,
    weights: str = "",
    opts: Sequence[Any] = (),
    datasets: Sequence[str] = (),
    channels: Optional[Mapping[str, Any]] = None,
    seed: int = 0,
) -> InheritanceReport:
    """Do the same with keyword arguments.

    Args:
        student: a detector with its own weights.
        build_batches: see :func:`inherit_from_config`; needed where the student is narrower and something is measured.
        parts: see ``MODEL.MGD.INHERIT``.
        config_file: see the keys of ``MODEL.MGD.TEACHER``.
        weights: see ``MODEL.MGD.TEACHER``.
        opts: see ``MODEL.MGD.TEACHER``.
        datasets: names of the student's training sets, whose classes are compared with the teacher's.
        channels: the keys of ``MODEL.MGD.INHERIT_CHANNELS`` in small letters, the arguments of
            :class:`NarrowingOptions`; others have their default.
        seed: of the global random generators while the batches are read.

    Raises:
        ArgumentError: an argument has a wrong value, or nothing fits.
        UserError: the teacher's config or weights cannot be used.
    """
    check_parts(parts)
    options = _options_of(channels or {})
    cfg = merge_config("", [])
    teacher = cfg.MODEL.MGD.TEACHER
    teacher.CONFIG_FILE, teacher.WEIGHTS, teacher.OPTS = config_file, weights, list(opts)
    return _inherit(student, parts, teacher_config(cfg), _classes_of_sets(datasets), options, build_batches, seed)


def _options_of(channels: Mapping[str, Any]) -> NarrowingOptions:
    check_options("channels", channels, [field.name for field in dataclasses.fields(NarrowingOptions)])
    try:
        return NarrowingOptions(**channels)
    except ArgumentError as e:
        raise ArgumentError(f"channels.{e.argument}", e.problem) from e


def _inherit(
    student: nn.Module,
    parts: Sequence[str],
    teacher_cfg: CfgNode,
    classes: Optional[List[str]],
    options: NarrowingOptions,
    build_batches: Optional[BuildBatches],
    seed: int,
) -> InheritanceReport:
    theirs = _classes_of(teacher_cfg)
    same_classes = classes is None or theirs is None or classes == theirs
    teacher, state = trained_detector(teacher_cfg)
    narrowed = None
    is_narrower = bool(narrower_sets(channel_layout(teacher), channel_layout(student)))
    is_fitted = options.compensate and bool(factorised_layers(student, state))
    if options.criterion != NO_CRITERION and (is_narrower or is_fitted):
        batches: Iterable[Any] = ()
        if options.is_measured:
            if build_batches is None:
                raise ArgumentError(
                    "channels.criterion",
                    f"is {options.criterion!r} with compensate {options.compensate}, for which the teacher must run on "
                    "batches: give build_batches, or use 'weight' and compensate False",
                )
            batches = build_batches(teacher_cfg.INPUT.FORMAT)  # on every rank, because building a loader is collective
        device = next(student.parameters()).device
        narrowed = on_main_process(lambda: _narrow(teacher.to(device), student, state, options, batches, seed))
    report = inherit(student, state, parts, same_classes=same_classes, narrowed=narrowed)
    lines = [f"The student starts from these tensors of its teacher ({', '.join(parts)}):", str(report)]
    empty = report.empty_parts(parts)
    if empty:
        lines.append(f"Nothing was inherited of: {', '.join(empty)}")
    logger.log(logging.WARNING if empty else logging.INFO, "\n".join(lines))
    _pass_on_channels(student, parts, narrowed)
    return report


def _narrow(
    teacher: nn.Module,
    student: nn.Module,
    state: Mapping[str, Tensor],
    options: NarrowingOptions,
    batches: Iterable[Any],
    seed: int,
) -> Narrowed:
    device = next(student.parameters()).device
    if options.is_measured:
        logger.info(f"Measuring the teacher's channels on {options.num_batches} batches of rank 0 ...")
    with seeded(Purpose.INHERITING, seed, device=device):
        return narrow(teacher, student, state, options, islice(batches, options.num_batches))


def _pass_on_channels(student: nn.Module, parts: Sequence[str], narrowed: Optional[Narrowed]) -> None:
    """Tell the distillation from which of the teacher's channels the FPN's learn."""
    distillation = find_distillation(student)
    if distillation is None or not distillation.distiller.inheriting_positions:
        return
    channels = None if narrowed is None or "fpn" not in parts else narrowed.channels.get(FPN_OUTPUTS)
    if channels is None:
        names = ", ".join(p.name for p in distillation.distiller.inheriting_positions)
        raise UserError(
            f"the matching at {names} is 'inherited' (MODEL.MGD.MATCHING.KINDS), but no channels of the teacher's FPN "
            f'were chosen: inherit "fpn" (MODEL.MGD.INHERIT is {list(parts)}) with a criterion other than '
            f"{NO_CRITERION!r}, or use 'assignment'"
        )
    distillation.distiller.set_inherited_channels(channels)


def trained_detector(teacher_cfg: CfgNode) -> Tuple[nn.Module, Dict[str, Tensor]]:
    """Build a trained detector on the CPU.

    The global random generator does not change.

    Returns:
        The detector, and those of its tensors that its MODEL.WEIGHTS have, by name.

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
    return detector, {name: value for name, value in detector.state_dict().items() if name not in unset}


def _classes_of(cfg: CfgNode) -> Optional[List[str]]:
    """Return the names of the classes that a detector was trained on, or None if they are not known here."""
    path = cfg.DATASETS.COCO_FOLDER.TRAIN_JSON
    # With a folder, its DATASETS.TRAIN has the name that the student's own folder has as well.
    return classes_of_json(path) if path else _classes_of_sets(cfg.DATASETS.TRAIN)


def _classes_of_sets(names: Sequence[str]) -> Optional[List[str]]:
    """Return the class names of the first data set, or None if they are not known without loading it."""
    return classes_without_loading(names[0]) if names else None
