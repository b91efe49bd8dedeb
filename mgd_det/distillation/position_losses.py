"""The losses that a position can have, by the names of MODEL.MGD.LOSS.NAMES."""

import inspect
import math
from functools import cached_property
from typing import Any, Callable, Dict, Optional, Sequence, Type

import torch
from torch import nn

from mgd_det.distillation.fused import amp_partial_l2
from mgd_det.distillation.losses import attention_transfer, channel_wise_kl, partial_l2, pearson_distance, plain_l2
from mgd_det.distillation.positions import Position
from mgd_det.distillation.reducers import REDUCERS, Reduced
from mgd_det.errors import UserError

# What the authors' Detectron2 code divides the loss of a position by (kaiyuyue/mgd, `loss_factors` of
# mgd/builder.py); it sums over the images of one GPU and divides by those of all 8 (d2/train_net.py).
AUTHORS_FACTORS = {"res2": 5e7, "res3": 5e7, "res4": 5e6, "res5": 5e6}
AUTHORS_GPUS = 8


class PositionFeatures:
    """What a loss may look at; what none looks at is not computed.

    K of the student's channels have a group of teacher channels.

    Attributes:
        student: (B, Cs, H, W), as the student made it.
        teacher: (B, Ct, H, W), as the teacher made it.
        teacher_margin: (Ct,) <= 0, of the teacher's channels.
        groups: (K, G) long, the teacher channels of each matched student channel.
        mean_square: scalar > 0, of the target behind its margin, as measured with the first matching.
        reducer: a key of :data:`REDUCERS`.
    """

    def __init__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        *,
        teacher_margin: torch.Tensor,
        groups: torch.Tensor,
        mean_square: torch.Tensor,
        norm: Optional[nn.Module] = None,
        reducer: str = "amp",
        rows: Optional[torch.Tensor] = None,
    ) -> None:
        """
        Args:
            groups: (Cs, G) long; a row of -1 is a student channel without a teacher channel.
            norm: the training-time norm layer of the student's channels.
            rows: (K,) long, the channels that have one; None where all have.
        """
        self.student, self.teacher = student, teacher
        self.teacher_margin, self.mean_square, self.reducer = teacher_margin, mean_square, reducer
        self._norm = norm
        self._rows = rows
        self.groups = groups if rows is None else groups[rows]

    @cached_property
    def matched(self) -> torch.Tensor:
        """(B, K, H, W), the student's matched channels."""
        return self.student if self._rows is None else self.student.index_select(1, self._rows)

    @cached_property
    def normed(self) -> torch.Tensor:
        """(B, K, H, W), the student's matched channels behind the norm layer."""
        assert self._norm is not None, "a loss that looks at this says so by needs_norm"
        normed = self._norm(self.student)
        return normed if self._rows is None else normed.index_select(1, self._rows)

    @property
    def target(self) -> torch.Tensor:
        """(B, K, H, W), the teacher's channels reduced to the student's."""
        return self._reduced[0]

    @property
    def margin(self) -> torch.Tensor:
        """(K,) <= 0, of the target."""
        return self._reduced[1]

    @cached_property
    def _reduced(self) -> Reduced:
        return REDUCERS[self.reducer](self.teacher, self.teacher_margin, self.groups)


class PositionLoss:
    """Base of the losses. A subclass is registered by :func:`register_position_loss`.

    Its constructor's keyword arguments are the keys of its config node, MODEL.MGD.LOSS.<NAME>, in lower case
    and without WEIGHTS; it raises UserError for a value that is none.

    Attributes:
        needs_matching: whether it looks at more than ``student`` and ``teacher``.
        needs_norm: whether it looks at ``normed``.
    """

    needs_matching = True
    needs_norm = False

    def check(self, positions: Sequence[Position]) -> None:
        """Raises UserError where the loss cannot be computed at one of these positions."""

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        """The unweighted loss, a scalar of float32 or better, divided so that it does not grow with the batch."""
        raise NotImplementedError


POSITION_LOSS_REGISTRY: Dict[str, Type[PositionLoss]] = {}


def register_position_loss(name: str) -> Callable[[Type[PositionLoss]], Type[PositionLoss]]:
    """Class decorator: makes a :class:`PositionLoss` available as ``name`` in MODEL.MGD.LOSS.NAMES.

    Losses of one's own also want a config node MODEL.MGD.LOSS.<NAME> with WEIGHTS. They are logged as
    ``loss_<name>_<position>``.
    """

    def register(loss: Type[PositionLoss]) -> Type[PositionLoss]:
        assert name not in POSITION_LOSS_REGISTRY, f"there is a position loss {name!r} already"
        POSITION_LOSS_REGISTRY[name] = loss
        return loss

    return register


def build_position_loss(name: str, options: Dict[str, Any]) -> PositionLoss:
    """The loss of that name. Raises UserError for one that there is not."""
    check_choice("MODEL.MGD.LOSS.NAMES", name, POSITION_LOSS_REGISTRY)
    loss = POSITION_LOSS_REGISTRY[name]
    known = list(inspect.signature(loss).parameters)
    for key in options:
        if key not in known:
            raise UserError(
                f"MODEL.MGD.LOSS.{name.upper()}.{key.upper()}: the loss {name!r} has no such option; it has "
                f"{', '.join(key.upper() for key in ['weights', *known])}"
            )
    return loss(**options)


@register_position_loss("partial_l2")
class PartialL2(PositionLoss):
    """The loss of MGD: see :func:`mgd_det.distillation.losses.partial_l2`."""

    needs_norm = True

    def __init__(self, *, scale: str = "target") -> None:
        """
        Args:
            scale: "mean", "target" or "authors", see ``MODEL.MGD.LOSS.PARTIAL_L2.SCALE``.
        """
        check_choice("MODEL.MGD.LOSS.PARTIAL_L2.SCALE", scale, ("mean", "target", "authors"))
        self.scale = scale

    def check(self, positions: Sequence[Position]) -> None:
        for position in positions if self.scale == "authors" else ():
            if position.teacher not in AUTHORS_FACTORS:
                raise UserError(
                    "MODEL.MGD.LOSS.PARTIAL_L2.SCALE is 'authors', who have no factor for the teacher's "
                    f"{position.teacher!r}: use positions of {', '.join(AUTHORS_FACTORS)}, or another scale"
                )

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        if features.reducer in ("amp", "sm"):
            total = amp_partial_l2(features.normed, features.teacher, features.teacher_margin, features.groups)
        else:
            total = partial_l2(features.normed, features.target, features.margin, "sum")
        if self.scale == "authors":
            images = max(features.student.shape[0], 1)
            return total / (images * AUTHORS_FACTORS[position.teacher] * AUTHORS_GPUS)
        loss = total / max(features.normed.numel(), 1)
        return loss / features.mean_square if self.scale == "target" else loss


@register_position_loss("l2")
class PlainL2(PositionLoss):
    """Squared difference of the normed student and the reduced teacher, without margin or mask."""

    needs_norm = True

    def __init__(self, *, scale: str = "target") -> None:
        check_choice("MODEL.MGD.LOSS.L2.SCALE", scale, ("mean", "target"))
        self.scale = scale

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        loss = plain_l2(features.normed, features.target)
        if self.scale == "mean":
            return loss
        # Of this batch: what was measured is of the target behind its margin, which is not followed here.
        mean_square = features.target.float().square().mean()
        return loss / torch.where(mean_square > 0, mean_square, 1.0)


@register_position_loss("cwd")
class ChannelWiseKL(PositionLoss):
    """CWD between the normed student, whose scale is learned so, and the reduced teacher."""

    needs_norm = True

    def __init__(self, *, temperature: float = 1.0) -> None:
        self.temperature = check_positive("MODEL.MGD.LOSS.CWD.TEMPERATURE", temperature)

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        return channel_wise_kl(features.normed, features.target, self.temperature)


@register_position_loss("pkd")
class Pearson(PositionLoss):
    """PKD between the student's matched channels and the reduced teacher; no norm layer could change it much."""

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        return pearson_distance(features.matched, features.target)


@register_position_loss("at")
class AttentionTransfer(PositionLoss):
    """Attention transfer between all channels of both: it needs no matching."""

    needs_matching = False

    def __init__(self, *, power: float = 2.0) -> None:
        self.power = check_positive("MODEL.MGD.LOSS.AT.POWER", power)
        if self.power < 1:
            raise UserError(f"MODEL.MGD.LOSS.AT.POWER is {power!r}; give a number >= 1")

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        return attention_transfer(features.student, features.teacher, self.power)


def check_choice(key: str, value: str, choices: Any) -> None:
    """Raises UserError where ``value`` of the config key is none of ``choices``."""
    if value not in choices:
        raise UserError(f"{key} is {value!r}; use one of {', '.join(choices)}")


def check_positive(key: str, value: float) -> float:
    """``value``; UserError where it is no finite number > 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise UserError(f"{key} is {value!r}; give a number > 0")
    return float(value)
