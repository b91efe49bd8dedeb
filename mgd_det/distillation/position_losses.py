"""The losses that a position can have, by the names of MODEL.MGD.LOSS.NAMES."""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, Mapping, Optional, Sequence, Type

import torch
from fvcore.common.registry import Registry
from torch import nn

from mgd_det.distillation.fused import amp_partial_l2
from mgd_det.distillation.losses import (
    activation_boundary,
    at_least_float32,
    attention_transfer,
    channel_wise_kl,
    flow_of_solution,
    fsp_matrix,
    partial_l2,
    pearson_distance,
    plain_l2,
)
from mgd_det.distillation.positions import Position
from mgd_det.distillation.reducers import REDUCERS, Reduced
from mgd_det.errors import ArgumentError, check_choice, check_positive

# What the authors' Detectron2 code divides the loss of a position by (kaiyuyue/mgd, `loss_factors` of
# mgd/builder.py); it sums over the images of one GPU and divides by those of all 8 (d2/train_net.py).
AUTHORS_FACTORS = {"res2": 5e7, "res3": 5e7, "res4": 5e6, "res5": 5e6}
AUTHORS_GPUS = 8

# The default losses of a distiller and of MODEL.MGD.LOSS.
DEFAULT_LOSSES: Mapping[str, Mapping[str, Any]] = {"partial_l2": {"weights": 0.5}}


@dataclass(eq=False)
class PositionFeatures:
    """The inputs of a loss. Those that no loss reads are not computed.

    K of the Cs student channels have a group of teacher channels.

    Attributes:
        student: (B, Cs, H, W), as the student made it.
        teacher: (B, Ct, H, W), as the teacher made it.
        teacher_margin: (Ct,) <= 0, of the teacher's channels.
        groups: (K, G) long, the teacher channels of each matched student channel; given as (Cs, G), where a row of -1
            is a student channel without a teacher channel.
        mean_square: scalar > 0, of the target behind its margin, as measured in the matching's first window.
        norm: the training-time norm layer of the student's channels.
        reducer: a key of :data:`REDUCERS`.
        adapter: a learned 1 x 1 convolution of the student's channels to the teacher's, or None. With it, Cs is Ct
            everywhere but in ``student``.
        rows: (K,) long, the student channels that have a group; None if all have one.
        mask: (B, 1, H, W) float32 >= 0, how much each pixel counts; None if all count 1.
        following: the features of the next position, or None at the last one.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    teacher_margin: torch.Tensor
    groups: torch.Tensor
    mean_square: torch.Tensor
    norm: Optional[nn.Module] = None
    reducer: str = "amp"
    adapter: Optional[nn.Module] = None
    rows: Optional[torch.Tensor] = None
    mask: Optional[torch.Tensor] = None
    following: Optional["PositionFeatures"] = None

    def __post_init__(self) -> None:
        if self.rows is not None:
            self.groups = self.groups[self.rows]

    @cached_property
    def adapted(self) -> torch.Tensor:
        """(B, Cs, H, W), the student behind the adapter, if there is one."""
        return self.student if self.adapter is None else self.adapter(self.student)

    @cached_property
    def matched(self) -> torch.Tensor:
        """(B, K, H, W), the student's matched channels."""
        return self.adapted if self.rows is None else self.adapted.index_select(1, self.rows)

    @cached_property
    def normed(self) -> torch.Tensor:
        """(B, K, H, W), the student's matched channels behind the norm layer."""
        assert self.norm is not None, "a loss that reads `normed` must set needs_norm"
        normed = self.norm(self.adapted)
        return normed if self.rows is None else normed.index_select(1, self.rows)

    @property
    def target(self) -> torch.Tensor:
        """(B, K, H, W), the teacher's channels reduced to the student's."""
        return self._reduced[0]

    @property
    def margin(self) -> torch.Tensor:
        """(K,) <= 0, of the target."""
        return self._reduced[1]

    @cached_property
    def unit_target(self) -> torch.Tensor:
        """(B, K, H, W), the target divided by its root mean square in this batch, in float32 at least."""
        target = at_least_float32(self.target)
        mean_square = target.square().mean()
        return target * torch.where(mean_square > 0, mean_square, 1.0).rsqrt()

    @cached_property
    def _reduced(self) -> Reduced:
        return REDUCERS[self.reducer](self.teacher, self.teacher_margin, self.groups)


class PositionLoss:
    """Base of the losses of :data:`POSITION_LOSS_REGISTRY`.

    For a value that it cannot use, a constructor raises :class:`ArgumentError` about ``losses.<name>.<argument>``.

    Attributes:
        needs_matching: whether it reads more than ``student`` and ``teacher`` of :class:`PositionFeatures`.
        needs_norm: whether it reads ``normed``.
        needs_statistics: whether it reads ``margin`` or ``mean_square``, which must be measured even if the groups
            are fixed.
        needs_following: whether it compares each position with the next one, and so is not computed at the last.
        takes_mask: whether it weights pixels by ``mask`` where there is one.
    """

    needs_matching = True
    needs_norm = False
    needs_statistics = False
    needs_following = False
    takes_mask = False

    def check(self, positions: Sequence[Position]) -> None:
        """Raise ArgumentError if the loss cannot be computed at one of these positions."""

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        """Compute the unweighted loss, a scalar of float32 or better that does not grow with the batch."""
        raise NotImplementedError


POSITION_LOSS_REGISTRY = Registry("POSITION_LOSS")
POSITION_LOSS_REGISTRY.__doc__ = """
Registry of the losses at a position, by their names in MODEL.MGD.LOSS.NAMES.

A registered class is a :class:`PositionLoss`. Its constructor takes the keys of the config node MODEL.MGD.LOSS.<NAME>
(which the config must have) as keyword arguments, in lower case and without WEIGHTS and DECAY. An object is called
with a :class:`Position` and its :class:`PositionFeatures` and returns a scalar, which is logged as
``loss_<name>_<position>``.
"""


def register_position_loss(name: str) -> Callable[[Type[PositionLoss]], Type[PositionLoss]]:
    """Return a class decorator that puts a :class:`PositionLoss` into :data:`POSITION_LOSS_REGISTRY` as ``name``.

    Example:
        >>> @register_position_loss("cosine")
        ... class Cosine(PositionLoss):
        ...     def __call__(self, position, features):
        ...         return (1 - torch.cosine_similarity(features.matched, features.target)).mean()
    """

    def register(loss: Type[PositionLoss]) -> Type[PositionLoss]:
        POSITION_LOSS_REGISTRY._do_register(name, loss)  # `register` would name it after the class
        return loss

    return register


def build_position_loss(name: str, options: Mapping[str, Any]) -> PositionLoss:
    """Build the loss that is registered as ``name``.

    Args:
        name: a name in :data:`POSITION_LOSS_REGISTRY`.
        options: the constructor's keyword arguments.

    Raises:
        ArgumentError: there is no such loss or option, or the loss cannot use the value of an option.
    """
    check_choice("losses", name, [known for known, _ in POSITION_LOSS_REGISTRY])
    loss = POSITION_LOSS_REGISTRY.get(name)
    known = list(inspect.signature(loss).parameters)
    for key in options:
        if key not in known:
            has = ", ".join(["weights", "decay", *known])
            raise ArgumentError(f"losses.{name}.{key}", f"is unknown; the options of this loss are: {has}")
    return loss(**options)


@register_position_loss("partial_l2")
class PartialL2(PositionLoss):
    """The loss of MGD: see :func:`mgd_det.distillation.losses.partial_l2`."""

    needs_norm = True
    needs_statistics = True
    takes_mask = True

    def __init__(self, *, scale: str = "target") -> None:
        """
        Args:
            scale: "mean", "target" or "authors"; see ``MODEL.MGD.LOSS.PARTIAL_L2.SCALE``.
        """
        check_choice("losses.partial_l2.scale", scale, ("mean", "target", "authors"))
        self.scale = scale

    def check(self, positions: Sequence[Position]) -> None:
        for position in positions if self.scale == "authors" else ():
            if position.teacher not in AUTHORS_FACTORS:
                raise ArgumentError(
                    "losses.partial_l2.scale",
                    f"is 'authors', which has no factor for the teacher's {position.teacher!r}; use positions of "
                    f"{', '.join(AUTHORS_FACTORS)}, or another scale",
                )

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        # A norm layer makes the student of about RMS 1. A target of RMS 1 too gives every position and teacher the same
        # loss and gradient; dividing the loss alone would leave the student a large or tiny target to chase.
        factor = features.mean_square.rsqrt() if self.scale == "target" else None
        if features.reducer in ("amp", "sm") and features.mask is None:
            total = amp_partial_l2(features.normed, features.teacher, features.teacher_margin, features.groups, factor)
        else:
            target, margin = features.target, features.margin
            if factor is not None:
                target, margin = at_least_float32(target) * factor, margin * factor
            total = partial_l2(features.normed, target, margin, "sum", features.mask)
        if self.scale == "authors":
            images = max(features.student.shape[0], 1)
            return total / (images * AUTHORS_FACTORS[position.teacher] * AUTHORS_GPUS)
        return total / max(features.normed.numel(), 1)


@register_position_loss("l2")
class PlainL2(PositionLoss):
    """Squared difference of the normed student and the reduced teacher: negative values count too."""

    needs_norm = True
    takes_mask = True

    def __init__(self, *, scale: str = "target") -> None:
        check_choice("losses.l2.scale", scale, ("mean", "target"))
        self.scale = scale

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        # Of this batch: the measured mean square is of the target behind its margin, which does not apply here.
        target = features.target if self.scale == "mean" else features.unit_target
        return plain_l2(features.normed, target, features.mask)


@register_position_loss("cwd")
class ChannelWiseKL(PositionLoss):
    """CWD between the normed student, whose scale the norm layer learns, and the reduced teacher."""

    needs_norm = True
    takes_mask = True

    def __init__(self, *, temperature: float = 1.0) -> None:
        self.temperature = check_positive("losses.cwd.temperature", temperature)

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        return channel_wise_kl(features.normed, features.target, self.temperature, features.mask)


@register_position_loss("pkd")
class Pearson(PositionLoss):
    """PKD between the student's matched channels and the reduced teacher; a norm layer would hardly change it."""

    takes_mask = True

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        return pearson_distance(features.matched, features.target, features.mask)


@register_position_loss("at")
class AttentionTransfer(PositionLoss):
    """Attention transfer between all channels of both nets: it needs no matching."""

    needs_matching = False
    takes_mask = True

    def __init__(self, *, power: float = 2.0) -> None:
        self.power = check_positive("losses.at.power", power)
        if self.power < 1:
            raise ArgumentError("losses.at.power", f"is {power!r}; give a number >= 1")

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        return attention_transfer(features.student, features.teacher, self.power, features.mask)


@register_position_loss("ab")
class ActivationBoundary(PositionLoss):
    """AB between the normed student, of which the margin is a share of its scale, and the reduced teacher's sign."""

    needs_norm = True
    takes_mask = True

    def __init__(self, *, margin: float = 1.0) -> None:
        self.margin = check_positive("losses.ab.margin", margin)

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        return activation_boundary(features.normed, features.target, self.margin, features.mask)


@register_position_loss("fsp")
class FlowOfSolution(PositionLoss):
    """FSP from a position to the next: of the normed student, and of the reduced teacher with root mean square 1."""

    needs_norm = True
    needs_following = True
    takes_mask = True

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        after = features.following
        assert after is not None, "FSP is not computed at the last position"
        is_smaller = after.student.shape[2:].numel() <= features.student.shape[2:].numel()
        mask = after.mask if is_smaller else features.mask
        student = fsp_matrix(features.normed, after.normed, mask)
        return flow_of_solution(student, fsp_matrix(features.unit_target, after.unit_target, mask))
