"""The pass for CUDA: plain torch, which torch.compile makes into one kernel.

It is compiled at the first step, for maps of any size, and again for another group size, dtype or memory format.
"""

import logging
from functools import cache
from typing import Callable, Set, Tuple

import torch

from mgd_det.distillation.fused import reference
from mgd_det.errors import first_line

logger = logging.getLogger(__name__)

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# How often it may be compiled: positions differ in group size, dtype and memory format. torch's own limit is 8.
_VARIANTS = 64
# Devices on which a variant could not be compiled, or was wrong: trying again would take long in every step.
_given_up: Set[torch.device] = set()


def is_for(*maps: torch.Tensor) -> bool:
    """Return whether :func:`residual` takes these maps: float32, float16 or bfloat16, on a GPU that runs it."""
    device = maps[0].device
    is_known = all(m.is_cuda and m.dtype in _TYPES and m.numel() > 0 for m in maps)
    return is_known and runs_on(device) and device not in _given_up


@cache
def runs_on(device: torch.device) -> bool:
    """Return whether the pass can be compiled for a device and agrees with plain torch; if not, a warning says why."""
    teacher = torch.tensor([1.0, -3, 2, -0.5, -2, 3, -4, 0.25, 0.5, -1, 1, 0.75], device=device).view(1, 3, 2, 2)
    student = teacher[:, :2].flip(1)
    groups = torch.tensor([[0, 1], [2, 0]], device=device)
    maps = student, teacher, -torch.ones(2, device=device), groups, torch.tensor(0.5, device=device)
    try:
        torch.testing.assert_close(residual(*maps), reference.residual(*maps))
    except AssertionError as e:
        _give_up(device, e)
    return device not in _given_up


def residual(
    student: torch.Tensor, teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor, factor: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`mgd_det.distillation.fused.reference.residual`, for maps that :func:`is_for` takes.

    If it cannot be compiled for them, a warning says why, and plain torch computes this and all that follow.
    """
    try:
        # Detached: a leaf that requires a gradient would be another variant.
        return _compiled()(student.detach(), teacher, margin, groups, factor)
    except torch.OutOfMemoryError:  # says nothing of the compiler
        raise
    except Exception as e:  # an old GPU, no Triton, no C compiler: each raises its own kind
        _give_up(student.device, e)
        return reference.residual(student, teacher, margin, groups, factor)


def _give_up(device: torch.device, error: Exception) -> None:
    if device not in _given_up:
        _given_up.add(device)
        logger.warning(
            f"The compiled distillation loss is not used on {device} ({first_line(error)}): plain torch is, "
            "which is slower and needs more memory."
        )


@cache
def _compiled() -> Callable[..., Tuple[torch.Tensor, torch.Tensor]]:
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _VARIANTS)
    return torch.compile(reference.residual_at_once, dynamic=True, fullgraph=True)
