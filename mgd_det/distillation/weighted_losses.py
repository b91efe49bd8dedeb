"""Losses with their weights at each position, as a config describes them."""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping

from mgd_det.distillation.position_losses import POSITION_LOSS_REGISTRY, PositionLoss, build_position_loss
from mgd_det.distillation.positions import Position
from mgd_det.distillation.schedule import DECAYS
from mgd_det.errors import ArgumentError, check_choice

# The loss of MGD is logged as loss_mgd_<position>, any other under its own name.
_LOG_NAMES = {"partial_l2": "mgd"}


def is_distillation_loss(name: str) -> bool:
    """Return whether a detector's loss, by the name under which it is logged, is one of distillation."""
    losses = [_LOG_NAMES.get(loss, loss) for loss, _ in POSITION_LOSS_REGISTRY]
    return name.startswith(("loss_kd_", *(f"loss_{loss}_" for loss in losses)))


@dataclass(frozen=True)
class WeightedLoss:
    """A loss, the name that its log entries begin with, and its weights."""

    log_name: str
    loss: PositionLoss
    weights: Dict[str, float]  # by position; 0 where it is not computed
    decay: str


def weighted_loss(name: str, options: Mapping[str, Any], positions: List[Position]) -> WeightedLoss:
    """Build a loss of :data:`POSITION_LOSS_REGISTRY` with its weights.

    Args:
        name: its name there.
        options: the loss's arguments, "weights" and "decay"; see :class:`Distiller`.
        positions: all positions.

    Raises:
        ArgumentError: an option is unknown or has a wrong value, or the loss cannot be computed at these positions.
    """
    arguments = dict(options)
    decay = arguments.pop("decay", "constant")
    check_choice(f"losses.{name}.decay", decay, DECAYS)
    weights = _one_a_position(f"losses.{name}.weights", arguments.pop("weights", 1.0), positions)
    loss = build_position_loss(name, arguments)
    if loss.needs_following:
        if len(positions) == 1 and any(weights.values()):
            raise ArgumentError(
                "losses",
                f"names {name!r}, which compares a position with the next one, but positions names one only "
                f"({positions[0].name}): name a second one, or take {name!r} out",
            )
        weights[positions[-1].name] = 0.0
    loss.check([p for p in positions if weights[p.name] > 0])
    return WeightedLoss(_LOG_NAMES.get(name, name), loss, weights, decay)


def _one_a_position(argument: str, weights: Any, positions: List[Position]) -> Dict[str, float]:
    given = [weights] if isinstance(weights, (int, float, str)) else list(weights)
    try:
        numbers = [float(weight) for weight in given]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) == 1:
        numbers = numbers * len(positions)
    if len(numbers) != len(positions) or any(not (math.isfinite(w) and w >= 0) for w in numbers):
        raise ArgumentError(argument, f"is {given}; give one number >= 0, or {len(positions)}, one a position")
    return {p.name: number for p, number in zip(positions, numbers)}
