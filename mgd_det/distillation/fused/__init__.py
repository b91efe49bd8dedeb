"""Absolute max pooling, marginal ReLU and partial L2 in one pass, which moves each map once.

The reduced teacher is never a map of its own: what is made of it is compared with the student and dropped while it is
in the cache. Forward writes the residual, the one map that backward needs.

It is plain torch (:mod:`.reference`), compiled for CUDA (:mod:`.compiled`).
"""

from typing import Any, Optional, Tuple

import torch
from torch.autograd.function import once_differentiable

from mgd_det.distillation.fused import compiled, reference

__all__ = ["amp_partial_l2"]


def amp_partial_l2(
    student: torch.Tensor,
    teacher: torch.Tensor,
    margin: torch.Tensor,
    groups: torch.Tensor,
    factor: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Compute ``partial_l2(student, *absolute_max_pooling(teacher, margin, groups), "sum")``, faster and smaller.

    With a factor, the student is compared with ``factor * teacher`` and ``factor * margin``; that map is not made.

    Args:
        student: (B, Cs, H, W).
        teacher: (B, Ct, H, W); never differentiated.
        margin: (Ct,) <= 0, of the teacher's channels.
        groups: (Cs, K) long, without -1. Groups of one channel are sparse matching.
        factor: scalar > 0; None is 1.

    Returns:
        A scalar of float32 (float64 for a student of float64). It is NaN if one of the maps has a NaN; its gradient may
        then be NaN at other places too.

    Raises:
        ValueError: sizes or groups that do not fit each other.

    Example:
        >>> student = torch.tensor([0.5, -2.0]).view(1, 1, 1, 2)
        >>> teacher = torch.tensor([[1.5, -0.5], [0.5, -1.0]]).view(1, 2, 1, 2)
        >>> amp_partial_l2(student, teacher, torch.tensor([-0.5, -0.5]), torch.tensor([[0, 1]])).item()
        1.0
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in size")
    if groups.dim() != 2 or groups.shape[0] != student.shape[1]:
        raise ValueError(f"groups are {tuple(groups.shape)} for {student.shape[1]} student channels")
    if groups.dtype != torch.long or groups.shape[1] == 0:
        raise ValueError(f"groups are {tuple(groups.shape)} of {groups.dtype}: give long indices, at least one a group")
    groups = groups.to(teacher.device)
    margin = margin.to(teacher.device)[groups].mean(dim=1)
    factor = margin.new_ones(()) if factor is None else factor.detach().to(teacher.device)
    return _AmpPartialL2.apply(student, teacher.detach(), margin, groups, factor)


class _AmpPartialL2(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        margin: torch.Tensor,
        groups: torch.Tensor,
        factor: torch.Tensor,
    ) -> torch.Tensor:
        version = compiled if compiled.is_for(student, teacher) else reference
        residual, total = version.residual(student, teacher, margin, groups, factor)
        ctx.save_for_backward(residual)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Tuple[torch.Tensor, None, None, None, None]:
        (residual,) = ctx.saved_tensors
        return reference.scaled(residual, 2 * gradient), None, None, None, None
