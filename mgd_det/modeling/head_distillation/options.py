"""Which predictions of the heads are distilled, and how strongly: keyword arguments and their checks."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, List, Mapping, Optional, Type

import torch

from mgd_det.distillation.schedule import DECAYS, decay_factor
from mgd_det.errors import ArgumentError, check_choice, check_not_negative, check_options, check_positive


@dataclass(frozen=True)
class HeadLossOptions:
    """Weight of one loss of the heads.

    Attributes:
        argument: of :class:`Distillation`, which holds the options.
        weight: > 0.
        decay: how the weight falls to 0, see :func:`decay_factor`.

    Raises:
        ArgumentError: a value is not as above.
    """

    argument: ClassVar[str]
    weight: float
    decay: str = "constant"

    def __post_init__(self) -> None:
        check_positive(f"{self.argument}.weight", self.weight)
        check_choice(f"{self.argument}.decay", self.decay, DECAYS)

    @property
    def key(self) -> str:
        """The config key of the weight."""
        return f"MODEL.MGD.{self.argument.upper()}.WEIGHT"

    def weighted(self, loss: torch.Tensor, progress: float) -> torch.Tensor:
        """Return ``loss`` times its weight at ``progress``, the part of the distillation that is done, in [0, 1]."""
        return self.weight * decay_factor(self.decay, progress) * loss


@dataclass(frozen=True)
class LogitOptions(HeadLossOptions):
    """Options of the classification logits: see ``MODEL.MGD.LOGITS``."""

    argument = "logits"
    temperature: float = 1.0
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("logits.temperature", self.temperature)
        check_not_negative("logits.focal_gamma", self.focal_gamma)


@dataclass(frozen=True)
class BoxOptions(HeadLossOptions):
    """Options of the boxes: see ``MODEL.MGD.BOXES``."""

    argument = "boxes"


@dataclass(frozen=True)
class MaskOptions(HeadLossOptions):
    """Options of the masks: see ``MODEL.MGD.MASKS``."""

    argument = "masks"


@dataclass(frozen=True)
class CrossHeadOptions(HeadLossOptions):
    """Options of CrossKD: see ``MODEL.MGD.CROSS_KD``."""

    argument = "cross_kd"
    box_weight: float = 1.0
    layer: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("cross_kd.box_weight", self.box_weight)
        if isinstance(self.layer, bool) or not (isinstance(self.layer, int) and self.layer >= -1):
            raise ArgumentError("cross_kd.layer", f"is {self.layer!r}; give a number of convolutions >= 0, or -1")


@dataclass(frozen=True)
class HeadOptions:
    """Options of the losses that are on; None for the others."""

    logits: Optional[LogitOptions] = None
    boxes: Optional[BoxOptions] = None
    masks: Optional[MaskOptions] = None
    cross_kd: Optional[CrossHeadOptions] = None

    @classmethod
    def from_arguments(cls, **arguments: Optional[Mapping[str, Any]]) -> "HeadOptions":
        """Make options from the keyword arguments of each loss, or None for a loss that is off.

        Raises:
            ArgumentError: an unknown option, a missing weight, or a wrong value.
        """
        kinds: List[Type[HeadLossOptions]] = [LogitOptions, BoxOptions, MaskOptions, CrossHeadOptions]
        on = {}
        for kind in kinds:
            given = arguments.get(kind.argument)
            if given is not None:
                check_options(kind.argument, given, [option.name for option in fields(kind)])
                # A missing weight is None, which is no number.
                on[kind.argument] = kind(**{"weight": None, **given})
        return cls(**on)  # type: ignore[arg-type]  # each kind under its own name

    @property
    def on(self) -> List[HeadLossOptions]:
        """The options of the losses that are on."""
        return [options for options in (getattr(self, field.name) for field in fields(self)) if options is not None]


def is_on(given: Optional[Mapping[str, Any]]) -> bool:
    """Return whether the keyword arguments of a loss turn it on: not if they are None or their weight is 0."""
    weight = None if given is None else given.get("weight")
    return given is not None and (isinstance(weight, bool) or weight != 0)
