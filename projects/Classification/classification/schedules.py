"""Schedules in epochs, as the paper states them, for a training that counts iterations."""

import math
from typing import Any, Dict, List, Sequence

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

from mgd_det.errors import ArgumentError

_NEVER = 10**9  # more iterations than any training has


def iterations_per_epoch(images: int, batch_size: int) -> int:
    """Return the batches that show every image once; the last one counts whole."""
    return math.ceil(images / batch_size)


def step_multipliers(epochs: int, drops: Sequence[int], warmup: int = 0, factor: float = 0.1) -> List[float]:
    """Return the learning rate of each epoch in units of its base: a step schedule.

    Args:
        epochs: of the whole training.
        drops: epochs, counted from 0 with warm-up, from which on the rate is ``factor`` times lower.
        warmup: epochs of a linear warm-up that starts at 0.1, as in the authors' cls/main_mgd.py.
        factor: in (0, 1].
    """
    return [_warmup(epoch, warmup, 0.1) * factor ** sum(epoch >= drop for drop in drops) for epoch in range(epochs)]


def cosine_multipliers(epochs: int, warmup: int = 0) -> List[float]:
    """Return the learning rate of each epoch in units of its base: half a cosine.

    Args:
        epochs: of the whole training.
        warmup: epochs of a linear warm-up that starts at 0.001, as in the authors' unsup/main_moco_mgd.py.
    """
    cosine = [(1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs)]
    return [_warmup(epoch, warmup, 0.001) if epoch < warmup else cosine[epoch] for epoch in range(epochs)]


def epochwise(multipliers: Sequence[float], per_epoch: int) -> Any:
    """Return the lr_multiplier of a LazyConfig that is constant within an epoch.

    Args:
        multipliers: one for each epoch.
        per_epoch: iterations of an epoch.
    """
    epochs = len(multipliers)
    milestones = [per_epoch * epoch for epoch in range(1, epochs)]
    return L(MultiStepParamScheduler)(values=list(multipliers), milestones=milestones, num_updates=per_epoch * epochs)


def matching_every(epochs: int, per_epoch: int) -> Dict[str, List[int]]:
    """Return ``periods`` and ``milestones`` of MatchingUpdate for an update after every so many epochs."""
    return {"periods": [epochs * per_epoch], "milestones": []}


def matching_at(epochs: Sequence[int], per_epoch: int) -> Dict[str, List[int]]:
    """Return ``periods`` and ``milestones`` of MatchingUpdate for updates after these epochs, and none after the last.

    Args:
        epochs: ascending, > 0. Each is a period that applies from the update before it to its own.
        per_epoch: iterations of an epoch.

    Raises:
        ArgumentError: the epochs do not ascend.
    """
    if not epochs or list(epochs) != sorted(set(epochs)) or epochs[0] < 1:
        raise ArgumentError("epochs", f"is {list(epochs)}; give ascending numbers > 0")
    updates = [epoch * per_epoch for epoch in epochs]
    return {"periods": [*updates, _NEVER], "milestones": [update + 1 for update in updates]}


def _warmup(epoch: int, warmup: int, start: float) -> float:
    if epoch >= warmup:
        return 1.0
    share = epoch / warmup
    return start * (1 - share) + share
