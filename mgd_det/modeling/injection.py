"""The student's backbone with distillation around it."""

import logging
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mgd_det.config import MGD_BACKBONE
from mgd_det.distillation import (
    Distiller,
    FeatureHooks,
    MatchingStatistics,
    PixelFormat,
    Teacher,
    distillation_features,
)
from mgd_det.distillation.compilation import compile_around
from mgd_det.distillation.position_losses import POSITION_LOSS_REGISTRY
from mgd_det.distillation.positions import make_positions, parse_position
from mgd_det.errors import UserError, check_choice
from mgd_det.modeling.logit_distillation import LogitDistillation
from mgd_det.modeling.teacher_builder import build_teacher

logger = logging.getLogger(__name__)

Features = Dict[str, torch.Tensor]


class MGDBackbone(Backbone):
    """Wraps a student's backbone and distils it from a teacher (Matching Guided Distillation).

    In training its forward also runs the teacher's backbone on the same images, once and no farther than it must,
    and keeps the losses for :func:`attach_losses`, which puts them into the detector's loss dict. In evaluation it
    is the student's backbone, no more. Its state dict is the student's: it has neither a prefix nor
    an entry of its own.

    It assumes that the detector calls it once a forward, with images that the detector normalised by
    ``pixels`` and padded with zeros.
    """

    @configurable
    def __init__(
        self,
        *,
        student: Backbone,
        teacher: Teacher,
        pixels: PixelFormat,
        positions: Sequence[str] = ("res2", "res3", "res4", "res5"),
        reducer: str = "amp",
        margin: str = "auto",
        norm: str = "GN",
        norm_groups: int = 32,
        losses: Optional[Mapping[str, Mapping[str, Any]]] = None,
        logits: Optional[Mapping[str, float]] = None,
        compile_student: bool = False,
    ) -> None:
        """
        Args:
            student: the student's backbone, with or without an FPN.
            teacher: the frozen teacher; a whole detector where ``logits`` are distilled.
            pixels: what the student's detector normalises images with.
            positions: features of the backbones to distil, see ``MODEL.MGD.POSITIONS``.
            margin: source of the teacher's margins, see :class:`MatchingStatistics`.
            reducer, norm, norm_groups: see :class:`Distiller`.
            losses: see :class:`Distiller`; default: partial L2 of weight 3.
            logits: keyword arguments of :class:`LogitDistillation`; None for none.
            compile_student: see ``MODEL.MGD.COMPILE_STUDENT``.

        Raises:
            UserError: a position that one of the nets lacks, maps of different size, or a value that is none.
        """
        super().__init__()
        self.student = student
        self._teacher = teacher
        available = distillation_features(student)
        pairs = [parse_position(text, available, teacher.available) for text in positions]
        student_specs = {name: available[name] for name, _ in pairs}
        self._taps = FeatureHooks(student, student_specs)
        self._read_in = [student.get_submodule(spec.module) for spec in student_specs.values()]
        self._is_to_be_compiled = compile_student
        self._measuring_taps = FeatureHooks(student, student_specs, stop_after_last=True)
        teacher.prepare(list(dict.fromkeys(name for _, name in pairs)), pixels)

        student_features, teacher_features = self._trial_forward(len(pixels.mean))
        paired = make_positions(pairs, student_features, teacher_features)
        losses = {"partial_l2": {"weights": (3.0,)}} if losses is None else losses
        self.distiller = Distiller(paired, reducer=reducer, norm=norm, norm_groups=norm_groups, losses=losses)
        self._logits = None if logits is None else LogitDistillation(teacher.detector, **logits)
        if not self.distiller.has_losses and self._logits is None:
            raise UserError(
                "MODEL.MGD.LOSS names no loss with a weight above 0, and MODEL.MGD.LOGITS.WEIGHT is 0: give one a "
                f"weight, or train without distillation (MODEL.BACKBONE.NAME other than {MGD_BACKBONE!r})"
            )
        self._teacher_outputs: Dict[str, torch.Tensor] = {}
        self._margin_source = margin
        self._measurement: Optional[MatchingStatistics] = None
        # Called in a training forward with the student's and the teacher's features by name, before the losses.
        self.feature_observer: Optional[Callable[[Features, Features], None]] = None
        self._losses: Dict[str, torch.Tensor] = {}
        self._image_sizes: Optional[List[Tuple[int, int]]] = None
        self._losses_are_collected = False
        self._load_prefix = ""
        self.register_load_state_dict_post_hook(self._report_student_keys)
        self.start_measurement()  # a margin source that does not suit the teacher is an error now
        _warn_of_frozen_positions(student_features)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: ShapeSpec, make_teacher: Optional[Callable[[CfgNode], Teacher]] = None
    ) -> Dict[str, Any]:
        """
        Args:
            make_teacher: in the place of :func:`build_teacher`.
        """
        mgd = cfg.MODEL.MGD
        if mgd.STUDENT_BACKBONE not in BACKBONE_REGISTRY or mgd.STUDENT_BACKBONE == MGD_BACKBONE:
            names = sorted(name for name, _ in BACKBONE_REGISTRY if name != MGD_BACKBONE)
            raise UserError(f"MODEL.MGD.STUDENT_BACKBONE is {mgd.STUDENT_BACKBONE!r}; use one of {', '.join(names)}")
        student = BACKBONE_REGISTRY.get(mgd.STUDENT_BACKBONE)(cfg, input_shape)
        # The teacher draws random weights before it loads its own: the detector's heads, which are built
        # next, shall start as they do without distillation.
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
            "logits": _lower_keys(mgd.LOGITS) if mgd.LOGITS.WEIGHT != 0 else None,
        }

    # ------------------------------------------------------------------ the student's interface
    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        """(B, C, H, W) to the student's features. In training, the losses are kept for the detector."""
        if self._measurement is not None:
            self._measure(images)
        if not self.training:
            return self.student(images)
        if not self._losses_are_collected:
            raise RuntimeError(
                "nothing collects the distillation losses: register the hook mgd_det.engine.MatchingUpdate on "
                "the trainer, or call mgd_det.modeling.attach_losses(detector)"
            )
        if self._is_to_be_compiled:
            self._is_to_be_compiled = False
            compile_around(self.student, self._read_in, "MODEL.MGD.COMPILE_STUDENT")
        # Begun first: it may run beside the student, and the student's maps for backward are not there yet.
        finish_teacher = self._teacher.start(images, self._image_sizes, whole=self._logits is not None)
        with self._taps.reading() as student_features:
            output = self.student(images)
        teacher_features, self._teacher_outputs = finish_teacher()
        if self.feature_observer is not None:
            self.feature_observer(student_features, teacher_features)
        self._losses = self.distiller(student_features, teacher_features)
        return output

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return self.student.output_shape()

    @property
    def size_divisibility(self) -> int:
        return self.student.size_divisibility

    @property
    def padding_constraints(self) -> Dict[str, int]:
        return self.student.padding_constraints

    def __getattr__(self, name: str) -> Any:
        # What is asked of the backbone by the student's names (checkpoints, exporters) is the student's.
        modules = self.__dict__.get("_modules", {})
        if name not in modules and "student" in modules and hasattr(modules["student"], name):
            return getattr(modules["student"], name)
        return super().__getattr__(name)

    # ------------------------------------------------------------------ the matching
    def start_measurement(self, of_training: bool = False) -> MatchingStatistics:
        """An empty measurement of this backbone's positions; ``of_training``: see :class:`MatchingStatistics`."""
        norms = {p.name: self._teacher.norm(p.teacher) for p in self.distiller.matched_positions}
        return MatchingStatistics(self.distiller, norms, self._margin_source, of_training=of_training)

    @torch.no_grad()
    def measure(self, detector: nn.Module, batch: List[Dict[str, Any]], measurement: MatchingStatistics) -> None:
        """Adds a batch of Detectron2's training inputs to ``measurement``; the backbones run up to the last feature.

        Args:
            detector: the detector that this backbone is part of, in eval mode.
        """
        assert not detector.training, "the matching is measured in eval mode"
        self._measurement = measurement
        try:
            detector(batch)
        except _BatchMeasured:
            pass
        finally:
            self._measurement = None

    def _measure(self, images: torch.Tensor) -> None:
        assert self._measurement is not None
        with self._measuring_taps.reading() as student_features:
            self.student(images)
        self._measurement.update(student_features, self._teacher(images, self._image_sizes))
        raise _BatchMeasured

    # ------------------------------------------------------------------ hooks on the detector
    def _note_image_sizes(self, detector: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        self._losses, self._teacher_outputs, self._image_sizes = {}, {}, None
        if self._logits is not None:
            self._logits.reset()
        if self.training or self._measurement is not None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            self._image_sizes = [tuple(x["image"].shape[-2:]) for x in inputs]

    def _add_losses(self, detector: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
        losses, self._losses = self._losses, {}
        outputs, self._teacher_outputs = self._teacher_outputs, {}
        if losses:
            output.update(losses)
        if outputs and self._logits is not None:
            output.update(self._logits.loss(outputs))

    # ------------------------------------------------------------------ construction
    def _trial_forward(self, channels: int) -> List[Dict[str, torch.Tensor]]:
        """Features of both nets for one small image: their true channels and sizes, and whether they are learned."""
        parameter = next(self.student.parameters())
        images = torch.zeros(1, channels, 64, 64, device=parameter.device)
        self._teacher.apply(lambda tensor: tensor.to(parameter.device))
        with evaluating(self.student), self._measuring_taps.reading() as student_features:
            self.student(images)
        return [student_features, self._teacher.try_out(images)]

    def _apply(self, fn: Any, recurse: bool = True) -> "MGDBackbone":
        self._teacher.apply(fn)
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------ state dict: the student's own
    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return self.student.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        # The caller hands the keys below `prefix` on to the submodules by name: give them the student's.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}student.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._load_prefix = prefix

    def _report_student_keys(self, module: nn.Module, incompatible: Any) -> None:
        """After loading: keys by the names they have in the file, and none of the distiller's."""
        distiller, student = f"{self._load_prefix}distiller.", f"{self._load_prefix}student."
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not k.startswith(distiller)]
        for keys in incompatible:
            keys[:] = [self._load_prefix + k[len(student) :] if k.startswith(student) else k for k in keys]


def _loss_options(node: CfgNode, name: str) -> Dict[str, Any]:
    check_choice("losses", name, [known for known, _ in POSITION_LOSS_REGISTRY])
    if list(node.NAMES).count(name) > 1:
        raise UserError(f"MODEL.MGD.LOSS.NAMES names {name!r} more than once")
    return _lower_keys(node.get(name.upper(), {}))


def _lower_keys(node: Mapping[str, Any]) -> Dict[str, Any]:
    return {key.lower(): value for key, value in node.items()}


def _warn_of_frozen_positions(student_features: Dict[str, torch.Tensor]) -> None:
    for name, feature in student_features.items():
        if torch.is_grad_enabled() and not feature.requires_grad:
            logger.warning(
                f"The student's {name} is frozen, so that distilling it teaches it nothing: lower "
                "MODEL.BACKBONE.FREEZE_AT, or take it out of MODEL.MGD.POSITIONS."
            )


class _BatchMeasured(Exception):
    """Ends a detector's forward once its backbone has measured the batch."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module in eval mode, and each submodule back into its own mode at the end."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def unwrapped(model: nn.Module) -> nn.Module:
    """The detector itself, also where it is inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def find_mgd_backbone(detector: nn.Module) -> Optional[MGDBackbone]:
    """The MGDBackbone of a detector (also inside DistributedDataParallel), or None."""
    return next((module for module in detector.modules() if isinstance(module, MGDBackbone)), None)


def attach_losses(detector: nn.Module) -> None:
    """Makes a detector's loss dict contain ``loss_mgd_<position>``, so that any trainer optimises and logs them.

    A second call changes nothing. Raises ValueError for a detector without an MGDBackbone.
    """
    detector = unwrapped(detector)
    backbone = find_mgd_backbone(detector)
    if backbone is None:
        raise ValueError(f"{type(detector).__name__} has no MGDBackbone: set MODEL.BACKBONE.NAME to build_mgd_backbone")
    if not backbone._losses_are_collected:
        if backbone._logits is not None:
            backbone._logits.attach(detector)
        # Bound methods, so that a deep copy of the detector collects its own losses.
        detector.register_forward_pre_hook(backbone._note_image_sizes, with_kwargs=True)
        detector.register_forward_hook(backbone._add_losses)
        backbone._losses_are_collected = True


@BACKBONE_REGISTRY.register()
def build_mgd_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MGDBackbone:
    """The backbone ``MODEL.MGD.STUDENT_BACKBONE``, distilled as ``MODEL.MGD`` says."""
    return MGDBackbone(cfg, input_shape)
