"""The teacher's channels that the levels of an inherited FPN come from: the check, and the error if there are none."""

from typing import Sequence

import torch

from mgd_det.distillation.positions import Position
from mgd_det.errors import UserError


def check_inherited_channels(position: Position, channels: torch.Tensor) -> None:
    """Check that ``channels``, (Cs,) long, are the teacher's channel of each of the student's at a position.

    Raises:
        ValueError: they are not as many as the student has, not different ones, or not the teacher's.
    """
    is_valid = channels.shape == (position.student_channels,) and len(channels.unique()) == len(channels)
    if not is_valid or not 0 <= int(channels.min()) <= int(channels.max()) < position.teacher_channels:
        raise ValueError(
            f"{len(channels)} inherited channels at {position.name}: give {position.student_channels} different ones "
            f"of {position.teacher_channels}"
        )


def no_inherited_channels(positions: Sequence[Position]) -> UserError:
    """Return the error of a distillation at these positions whose student has not inherited."""
    return UserError(
        f"the matching at {', '.join(p.name for p in positions)} is 'inherited' (MODEL.MGD.MATCHING.KINDS), but the "
        "student has not inherited the teacher's FPN: call mgd_det.modeling.inherit_from_config(cfg, detector), resume "
        "a checkpoint that has, or use another matching"
    )
