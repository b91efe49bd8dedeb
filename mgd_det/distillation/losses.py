"""Losses between a student feature and its target."""

import torch


def partial_l2(
    student: torch.Tensor, target: torch.Tensor, margin: torch.Tensor, reduction: str = "sum"
) -> torch.Tensor:
    """Partial L2 distance behind a marginal ReLU (Heo et al., ICCV 2019, equations 2 and 3).

    ``t = max(target, margin)``; the loss is ``(student - t)^2`` where ``student > t`` or ``t > 0``, and 0
    elsewhere: where the teacher is silent, a student that is still more silent is right.

    Args:
        student: (B, C, H, W).
        target: (B, C, H, W), the reduced teacher feature before its activation; never differentiated.
        margin: (C,) <= 0.
        reduction: "none" | "mean" | "sum". "mean" divides by all B * C * H * W elements, masked ones
            too, so that a weight means the same at every image and batch size.

    Returns:
        The loss in float32, also under autocast (float64 for float64 input): a scalar, or
        (B, C, H, W) for "none".
    """
    if student.shape != target.shape:
        raise ValueError(f"student {tuple(student.shape)} and target {tuple(target.shape)} differ in shape")
    student, target = _at_least_float32(student), _at_least_float32(target.detach())
    target = marginal_relu(target, margin)
    residual = torch.where((student > target) | (target > 0), student - target, 0.0)
    loss = residual.square()
    if reduction == "none":
        return loss
    if reduction == "mean":
        # An empty batch has no mean; its loss is 0.
        return loss.sum() / max(loss.numel(), 1)
    if reduction == "sum":
        return loss.sum()
    raise ValueError(f'reduction is {reduction!r}; it can be "none", "mean" or "sum"')


def marginal_relu(target: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """max(target, margin): (B, C, H, W) and (C,) to (B, C, H, W)."""
    return torch.maximum(target, margin.to(target).view(1, -1, 1, 1))


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
