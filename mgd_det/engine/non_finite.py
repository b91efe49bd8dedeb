"""Losses and gradients that are not finite: what to do about them, and what to tell the user."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Sequence, Type

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from mgd_det.distillation import Distiller
from mgd_det.errors import check_choice, check_count
from mgd_det.modeling import unwrapped

_POLICIES = ("stop", "skip")
_NAMED = 3  # how many tensors a message names


@dataclass(frozen=True)
class NonFinitePolicy:
    """What to do about a step whose loss or gradient is infinite or NaN. Such a step never changes the weights.

    Attributes:
        policy: "stop" the training, or "skip" the step and continue.
        max_in_a_row: > 0; the training stops at this many such steps in a row, also under "skip".

    Raises:
        ArgumentError: a value is not as above.
    """

    policy: str = "stop"
    max_in_a_row: int = 10

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, _POLICIES)
        check_count("max_in_a_row", self.max_in_a_row)


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite stops the training."""


@dataclass(frozen=True)
class StepReport:
    """What a rank reports about a step that is not finite.

    Attributes:
        losses: by name, the mean over the step's batches.
        files: the image files of the step's batches.
        gradients: names of parameters whose gradient is not finite.
        statistics: names of running statistics that are not finite.
        cause: the error that ended a forward early; then only the files are known.
    """

    losses: Dict[str, float]
    files: List[str]
    gradients: List[str] = field(default_factory=list)
    statistics: List[str] = field(default_factory=list)
    cause: str = ""

    @property
    def is_loss_finite(self) -> bool:
        return not self.cause and all(math.isfinite(loss) for loss in self.losses.values())


def describe(iteration: int, reports: Sequence[StepReport]) -> str:
    """Return one message, the same on every rank, from the reports of all ranks in their order.

    A value that is not finite spoils everything computed from it. The message therefore names only the first kind that
    is affected: losses, gradients, or running statistics; and only the ranks whose loss is affected, if there are any.
    """
    ranks = {rank: report for rank, report in enumerate(reports) if not report.is_loss_finite}
    if ranks:
        what = "Loss"
    else:
        ranks = dict(enumerate(reports))
        is_statistics = any(r.statistics for r in reports) and not any(r.gradients for r in reports)
        what = "Batch norm's running statistics" if is_statistics else "Gradient"
    lines = [f"{what} became infinite or NaN at iteration={iteration}"]
    for rank, report in ranks.items():
        parts = [report.cause, ", ".join(f"{name}={loss:.6g}" for name, loss in report.losses.items())]
        if report.is_loss_finite:
            parts.append(_named(report.gradients or report.statistics) or "the norm of all gradients overflows")
        parts.append(f"images: {', '.join(report.files) or 'without file names'}")
        lines.append((f"rank {rank}: " if len(reports) > 1 else "") + "; ".join(filter(None, parts)))
    return "\n".join(lines)


def _named(tensors: List[str]) -> str:
    more = len(tensors) - _NAMED
    return ", ".join(tensors[:_NAMED]) + (f" and {more} more" if more > 0 else "")


class ForwardState:
    """The state that a training forward changes: running statistics, and RetinaNet's loss normalizer.

    NaN or infinity would stay in batch norm's running statistics for good.
    """

    def __init__(self, model: nn.Module) -> None:
        self._detector: Any = unwrapped(model)
        # Not the distiller's buffers: they hold the matching, which a forward may solve (source "online").
        kept = (FrozenBatchNorm2d, Distiller)
        modules = [(name, m) for name, m in self._detector.named_modules() if not isinstance(m, kept)]
        self._owners = [(name, m) for name, m in modules if next(m.buffers(recurse=False), None) is not None]
        self._remembered: Dict[str, torch.Tensor] = {}
        self._normalizer: Any = None  # number or scalar tensor, replaced and never changed in place; None if absent

    def remember(self) -> None:
        """Keep a copy of the state for :meth:`restore`."""
        # All buffers, as they are small: torch does not count what batch norm writes (Tensor._version).
        self._remembered = {name: buffer.detach().clone() for name, buffer in self._buffers().items()}
        self._normalizer = getattr(self._detector, "loss_normalizer", None)

    def restore(self) -> None:
        """Restore the state of the last :meth:`remember`."""
        for name, buffer in self._buffers().items():
            buffer.copy_(self._remembered[name])
        if self._normalizer is not None:
            self._detector.loss_normalizer = self._normalizer
        elif hasattr(self._detector, "loss_normalizer"):
            del self._detector.loss_normalizer

    def statistics(self) -> Dict[str, torch.Tensor]:
        """Return the running statistics by name."""
        return {name: x for name, x in self._buffers(nn.modules.batchnorm._NormBase).items() if x.is_floating_point()}

    def _buffers(self, kind: Type[nn.Module] = nn.Module) -> Dict[str, torch.Tensor]:
        return {
            f"{prefix}.{name}": buffer
            for prefix, module in self._owners
            if isinstance(module, kind)
            for name, buffer in module.named_buffers(recurse=False)
        }
