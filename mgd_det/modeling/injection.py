"""Distillation injected into a student's backbone, whose class and names do not change."""

import logging
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from detectron2.modeling import Backbone
from torch import nn

from mgd_det.config import MGD_BACKBONE
from mgd_det.distillation import (
    Distiller,
    FeatureHooks,
    MatchingReport,
    MatchingStatistics,
    Padding,
    PixelFormat,
    Teacher,
    TeacherNetwork,
    distillation_features,
)
from mgd_det.distillation.positions import make_positions, parse_position
from mgd_det.distillation.schedule import DistillationSchedule
from mgd_det.errors import ArgumentError, check_options
from mgd_det.modeling.head_distillation import HeadDistillation, HeadRecord, is_on
from mgd_det.modeling.modes import evaluating, unwrapped
from mgd_det.modeling.pixel_masks import PixelMask
from mgd_det.modeling.training_forward import Batch, Features, TrainingForward

logger = logging.getLogger(__name__)

_CHECKPOINTING = (
    "Gradient checkpointing of the whole backbone does this: put stages or blocks inside it under "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), not the backbone itself"
)


class Distillation(nn.Module):
    """Matching Guided Distillation of the backbone whose child it is.

    The backbone keeps its class, attributes, parameter names and state dict. In a training forward of the detector,
    hooks on the backbone run the teacher once on the same images, up to the last feature that is needed, and compute
    the losses. A hook on the detector (:func:`attach_losses`) adds them to its loss dict. In evaluation, or if
    gradients are off, nothing happens.

    It assumes that the detector calls its backbone once a forward, with images that the detector normalised by
    ``pixels`` and padded with zeros.

    Attributes:
        distiller: norm layers, matching and losses.
        schedule: which steps distil; the teacher does not run in the others.
        teacher: the frozen teacher; not a module.
        observer: called in each training forward with the student's and the teacher's features by name, before the
            losses; or None. Deep copies and pickles leave it out.
    """

    def __init__(
        self,
        student: Backbone,
        *,
        teacher: TeacherNetwork,
        pixels: PixelFormat,
        positions: Sequence[str] = ("res2", "res3", "res4", "res5"),
        reducer: str = "amp",
        margin: str = "auto",
        norm: str = "GN",
        norm_groups: int = 32,
        losses: Optional[Mapping[str, Mapping[str, Any]]] = None,
        logits: Optional[Mapping[str, Any]] = None,
        pixel_mask: Optional[Mapping[str, Any]] = None,
        boxes: Optional[Mapping[str, Any]] = None,
        masks: Optional[Mapping[str, Any]] = None,
        cross_kd: Optional[Mapping[str, Any]] = None,
        matchings: Union[str, Sequence[str]] = "auto",
        inherits_fpn: bool = False,
        interval: int = 1,
        stop_iter: int = 0,
    ) -> None:
        """
        Args:
            student: the backbone, with or without an FPN. The new module registers hooks on it and does not keep it.
            teacher: the network that teaches; a whole detector if its heads teach too, or give the scores of
                ``pixel_mask``.
            pixels: what the student's detector normalises images with.
            positions: features of the backbones to distil, see ``MODEL.MGD.POSITIONS``.
            margin: source of the teacher's margins, see :class:`MatchingStatistics`.
            reducer: see :class:`Distiller`.
            norm: see :class:`Distiller`.
            norm_groups: see :class:`Distiller`.
            losses: see :class:`Distiller`; default: partial L2.
            pixel_mask: keyword arguments of :class:`PixelMask`, which multiplies the losses at positions; None, or the
                name "", for none.
            logits: how the classes of the heads are distilled, see :class:`HeadDistillation`; None, or a weight of 0,
                for not at all.
            boxes: the same for their boxes.
            masks: the same for the masks of objects that they predict.
            cross_kd: the same for CrossKD.
            matchings: how channels are matched, for each position or for all; see ``MODEL.MGD.MATCHING.KINDS``.
            inherits_fpn: the student inherits the teacher's FPN, so that "auto" is "inherited" at narrower levels.
            interval: see :class:`DistillationSchedule`.
            stop_iter: see :class:`DistillationSchedule`.

        Raises:
            ArgumentError: a position that one of the nets lacks, maps of different size, or a wrong value.
            UserError: the teacher's weights leave a tensor unset that the positions need.
        """
        super().__init__()
        available = distillation_features(student)
        pairs = [parse_position(text, available, teacher.features) for text in positions]
        self._specs = {name: available[name] for name, _ in pairs}
        self._hooks = FeatureHooks(student, self._specs)
        self._hooks_of_measuring = FeatureHooks(student, self._specs, stop_after_last=True)
        self.teacher = Teacher(teacher, list(dict.fromkeys(name for _, name in pairs)), pixels)
        student_features, teacher_features = self._try_out(student, channels=len(pixels.mean))
        self.distiller = Distiller(
            make_positions(pairs, student_features, teacher_features, matchings, inherits_fpn),
            reducer=reducer,
            norm=norm,
            norm_groups=norm_groups,
            losses=losses,
        )
        self.schedule = DistillationSchedule(interval, stop_iter)
        of_heads = {"logits": logits, "boxes": boxes, "masks": masks, "cross_kd": cross_kd}
        of_heads = {name: options for name, options in of_heads.items() if is_on(options)}
        self._heads = HeadDistillation(self.teacher, **of_heads) if of_heads else None
        if not self.distiller.has_losses and self._heads is None:
            raise ArgumentError(
                "losses",
                "has no loss with a weight above 0, and no head is distilled: give one a weight, or train without "
                f"distillation (MODEL.BACKBONE.NAME other than {MGD_BACKBONE!r})",
            )
        self._mask = None
        if pixel_mask and pixel_mask.get("name") != "":
            check_options("pixel_mask", pixel_mask, ["name", "foreground", "background"])
            self._mask = PixelMask(self.teacher, **{"name": None, **pixel_mask})
            self.distiller.check_mask(pixel_mask["name"])
        self._margin_source = margin
        self._is_attached = False
        self._is_measuring = False
        self._forward: Optional[TrainingForward] = None
        self.observer: Optional[Callable[[Features, Features], None]] = None
        self.start_matching()  # a margin source that does not suit the teacher is an error now
        _warn_of_frozen_positions(student_features)
        student.register_forward_pre_hook(self._before_backbone)
        student.register_forward_hook(self._after_backbone, always_call=True)

    # ------------------------------------------------------------------ the matching
    def start_matching(self, of_training: bool = False, first_window: bool = False) -> MatchingStatistics:
        """Return empty statistics of the positions; see :class:`MatchingStatistics` for the arguments."""
        norms = {p.name: self.teacher.norm(p.teacher) for p in self.distiller.matched_positions}
        return MatchingStatistics(
            self.distiller, norms, self._margin_source, of_training=of_training, first_window=first_window
        )

    @property
    def padding(self) -> Optional[Padding]:
        """The padding of the images of the forward under way, for an observer; None outside a forward."""
        return None if self._forward is None else self._forward.padding

    @torch.no_grad()
    def measure(self, detector: nn.Module, batch: Batch, statistics: MatchingStatistics) -> None:
        """Add a batch of Detectron2's training inputs to ``statistics``. The backbones run up to the last feature.

        Args:
            detector: the detector whose backbone this module is in, in eval mode.
        """
        assert not detector.training, "the matching is measured in eval mode"
        attach_losses(detector)
        self._is_measuring = True
        try:
            with self._hooks_of_measuring.reading() as student_features:
                detector(batch)
        finally:
            self._is_measuring = False
            forward, self._forward = self._forward, None
        assert forward is not None and forward.images is not None
        statistics.update(student_features, self.teacher(forward.images, forward.image_sizes), forward.padding)

    def solve_matching(self, detector: nn.Module, batches: Iterable[Batch]) -> List[MatchingReport]:
        """Solve the matching from batches of training inputs, for a training loop without :class:`MatchingUpdate`.

        Both nets run in eval mode and without gradient; the detector's modes are restored. Collective.

        Args:
            detector: the detector whose backbone this module is in.
            batches: one or more; the authors use 1 000 for each update.

        Returns:
            What changed at each position.

        Raises:
            FloatingPointError: features are not finite, or there is no batch.

        Example:
            >>> detector.backbone.mgd.solve_matching(detector, itertools.islice(data_loader, 100))
        """
        statistics = self.start_matching()
        with evaluating(detector):
            for batch in batches:
                self.measure(detector, batch, statistics)
        return statistics.solve()

    # ------------------------------------------------------------------ hooks on the backbone
    def _before_backbone(self, backbone: nn.Module, args: Tuple[Any, ...]) -> None:
        forward, images = self._forward, args[0]
        if forward is not None:
            forward.padding = Padding(forward.image_sizes, tuple(images.shape[-2:]))
        if forward is not None and forward.is_measured:
            forward.images = images
            return
        if not (backbone.training and torch.is_grad_enabled()):
            return
        if forward is None and torch._C._current_graph_task_id() != -1:  # in a backward
            raise RuntimeError(f"the student's backbone ran again in a backward. {_CHECKPOINTING}")
        if forward is None:
            raise RuntimeError(
                "the student's backbone ran in training mode where nothing collects the distillation losses: train "
                "with the hook mgd_det.engine.MatchingUpdate, or call mgd_det.modeling.attach_losses(detector) once; "
                "then call the detector itself, detector(batch), not its backbone or detector.forward(batch); to look "
                "at features, use eval() or torch.no_grad()"
            )
        if forward.losses is not None:
            raise RuntimeError(
                "the detector ran its backbone a second time in one forward: losses of the first would be lost. "
                "Distillation serves detectors that run their backbone once"
            )
        if not forward.distils:
            forward.losses = {}
            return
        # The teacher runs first, while the student's maps for backward are not in memory yet.
        if self._heads is None and not (self._mask is not None and self._mask.needs_scores):
            forward.teacher_features = self.teacher(images, forward.image_sizes)
        else:
            outputs = self.teacher.features_and_outputs(images, forward.image_sizes)
            forward.teacher_features, forward.teacher_outputs = outputs
        forward.reading = self._hooks.reading()
        forward.student_features = forward.reading.__enter__()

    def _after_backbone(self, backbone: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
        forward = self._forward
        if forward is None or forward.reading is None:
            return
        reading, forward.reading = forward.reading, None
        if output is None:  # the backbone raised: that the features are incomplete is not a second error
            interrupted = RuntimeError("the forward was interrupted")
            reading.__exit__(RuntimeError, interrupted, None)
            return
        reading.__exit__(None, None, None)
        self._check_graph(backbone, forward.student_features)
        if self.observer is not None:
            self.observer(forward.student_features, forward.teacher_features)
        forward.losses = self.distiller(
            forward.student_features,
            forward.teacher_features,
            progress=self.schedule.progress,
            masks=self._masks(forward),
        )

    def _masks(self, forward: TrainingForward) -> Optional[Features]:
        if self._mask is None:
            return None
        assert forward.padding is not None
        maps = {p.name: forward.student_features[p.student] for p in self.distiller.positions}
        return self._mask(maps, forward.padding, forward.inputs, forward.teacher_outputs)

    def _check_graph(self, backbone: nn.Module, features: Features) -> None:
        for name, feature in features.items():
            module = backbone.get_submodule(self._specs[name].module)
            if not feature.requires_grad and any(p.requires_grad for p in module.parameters()):
                raise RuntimeError(
                    f"the student's {name} has lost its graph, so that its loss would teach nothing. Reentrant "
                    "gradient checkpointing does this: use "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )

    # ------------------------------------------------------------------ hooks on the detector
    def _before_detector(self, detector: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        self._forward = None
        if detector.training != self.training:
            modes = {True: "training", False: "eval"}
            raise RuntimeError(
                f"the detector is in {modes[detector.training]} mode and its backbone in {modes[self.training]} mode, "
                "which distillation cannot serve: call train() or eval() on the detector as a whole; to freeze layers, "
                "set requires_grad to False"
            )
        if self._is_measuring or (detector.training and torch.is_grad_enabled()):
            inputs = args[0] if args else next(iter(kwargs.values()))
            sizes = [tuple(x["image"].shape[-2:]) for x in inputs]
            self._forward = TrainingForward(sizes, self._is_measuring, self.schedule.distils, inputs=inputs)

    def _after_detector(self, detector: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
        forward = self._forward
        if forward is None or forward.is_measured:
            return
        self._forward = None
        if output is None:  # the detector raised
            return
        if forward.losses is None:
            raise RuntimeError(
                "the detector returned without a distillation loss: its backbone did not run, or ran without "
                f"gradients. {_CHECKPOINTING}"
            )
        if not forward.distils:
            # DistributedDataParallel waits for a gradient of every parameter.
            for parameter in self.distiller.parameters():
                name = next(iter(output))
                output[name] = output[name] + 0 * parameter.sum()
            return
        output.update(forward.losses)
        if self._heads is not None:
            outputs, progress = forward.teacher_outputs, self.schedule.progress
            output.update(self._heads.losses(detector, outputs, forward.heads, progress))

    def _attach(self, detector: nn.Module) -> None:
        if self._is_attached:
            return
        self.teacher.optimize(next(detector.parameters()).device)
        self.distiller.teacher_hash = self.teacher.weights_hash
        self.distiller.detector_hash = self.teacher.detector_hash
        if self._heads is not None:
            self._heads.attach(detector, self._head_record)
        # Bound methods, so that a deep copy of the detector collects its own losses.
        detector.register_forward_pre_hook(self._before_detector, with_kwargs=True)
        detector.register_forward_hook(self._after_detector, always_call=True)
        self._is_attached = True

    def _head_record(self) -> Optional[HeadRecord]:
        return None if self._forward is None or not self._forward.distils else self._forward.heads

    # ------------------------------------------------------------------ a child that leaves no trace
    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return nothing: see :meth:`Distiller.distillation_state` for what training saves."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        # torch reports each tensor of a child that it does not find: give it the present ones.
        state_dict.update({prefix + name: tensor for name, tensor in super().state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> Dict[str, Any]:
        # An observer leads to the trainer and its data loader; a forward belongs to this object.
        return {**self.__dict__, "observer": None, "_forward": None}

    def _apply(self, fn: Any, recurse: bool = True) -> "Distillation":
        self.teacher.apply(fn)
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------ construction
    def _try_out(self, student: Backbone, channels: int) -> List[Features]:
        """Return the features of both nets for one small image, for their channels, sizes and gradients."""
        device = next(student.parameters()).device
        images = torch.zeros(1, channels, 64, 64, device=device)
        self.teacher.apply(lambda tensor: tensor.to(device))
        with evaluating(student), self._hooks_of_measuring.reading() as student_features:
            student(images)
        return [student_features, self.teacher(images)]


def attach_losses(detector: nn.Module) -> None:
    """Put ``loss_mgd_<position>`` into a detector's loss dict, so that any trainer optimises and logs them.

    Call it when the detector is on its device. A second call changes nothing.

    Args:
        detector: the model, or DistributedDataParallel around it.

    Raises:
        ValueError: its backbone is not distilled.
        UserError: an option of the teacher or of its heads does not suit the device or the detector.
    """
    detector = unwrapped(detector)
    distillation = find_distillation(detector)
    if distillation is None:
        raise ValueError(
            f"{type(detector).__name__} has no distillation: set MODEL.BACKBONE.NAME to {MGD_BACKBONE}, or build its "
            "backbone by distilled_backbone()"
        )
    distillation._attach(detector)


def find_distillation(detector: nn.Module) -> Optional[Distillation]:
    """Return the :class:`Distillation` in a detector (maybe in DistributedDataParallel), or None."""
    return next((module for module in detector.modules() if isinstance(module, Distillation)), None)


def _warn_of_frozen_positions(student_features: Features) -> None:
    for name, feature in student_features.items():
        if torch.is_grad_enabled() and not feature.requires_grad:
            logger.warning(
                f"The student's {name} is frozen, so that distilling it teaches it nothing: lower "
                "MODEL.BACKBONE.FREEZE_AT, or take it out of MODEL.MGD.POSITIONS."
            )
