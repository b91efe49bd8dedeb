"""Losses between a student feature and its target: functions of tensors.

Shape shorthand: B images, C channels, maps of H x W. Every loss is computed in float32, also under autocast
(float64 for float64 input). Only the student gets a gradient. For an empty batch, which has no mean, it is 0.
"""

from typing import Tuple

import torch
import torch.nn.functional as F

from mgd_det.errors import ArgumentError


def partial_l2(
    student: torch.Tensor, target: torch.Tensor, margin: torch.Tensor, reduction: str = "sum"
) -> torch.Tensor:
    """Compute the partial L2 distance behind a marginal ReLU (Heo et al., ICCV 2019, equations 2 and 3).

    With ``t = max(target, margin)`` the loss is ``(student - t)^2`` where ``student > t`` or ``t > 0``, and 0
    elsewhere: where the teacher is silent, a student below it is right.

    Args:
        student: (B, C, H, W).
        target: (B, C, H, W), the reduced teacher feature before its activation; never differentiated.
        margin: (C,) <= 0.
        reduction: "none" | "mean" | "sum". "mean" divides by all B * C * H * W elements, masked ones
            too, so that a weight means the same at every image and batch size.

    Returns:
        A scalar, or (B, C, H, W) for "none".

    Raises:
        ValueError: different shapes, or an unknown reduction.

    Example:
        >>> student = torch.tensor([1.0, 1.0, -3.0]).view(1, 1, 1, 3)
        >>> target = torch.tensor([3.0, -2.0, -1.0]).view(1, 1, 1, 3)
        >>> partial_l2(student, target, torch.tensor([-0.5]), reduction="none").flatten().tolist()
        [4.0, 2.25, 0.0]
    """
    student, target = _checked(student, target)
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
    raise ArgumentError("reduction", f'is {reduction!r}; use "none", "mean" or "sum"')


def marginal_relu(target: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Return max(target, margin): (B, C, H, W) and (C,) to (B, C, H, W)."""
    return torch.maximum(target, margin.to(target).view(1, -1, 1, 1))


def plain_l2(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared difference of two (B, C, H, W) over all elements, a scalar.

    Example:
        >>> plain_l2(torch.zeros(1, 1, 1, 2), torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)).item()
        5.0
    """
    student, target = _checked(student, target)
    return (student - target).square().sum() / max(student.numel(), 1)


def channel_wise_kl(student: torch.Tensor, target: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute the loss of channel-wise knowledge distillation (CWD; Shu et al., ICCV 2021, section 3).

    Each channel's map becomes a distribution over its pixels, ``softmax(x / temperature)``; the loss is
    ``temperature^2 * KL(target || student)``, the mean over images and channels.

    Args:
        student: (B, C, H, W).
        target: (B, C, H, W).
        temperature: > 0; the larger, the more pixels count.

    Returns:
        A scalar >= 0.

    Example:
        >>> round(channel_wise_kl(torch.zeros(1, 1, 1, 2), torch.tensor([0.0, 100.0]).view(1, 1, 1, 2)).item(), 4)
        0.6931
    """
    student, target = _checked(student, target)
    log_s = F.log_softmax(student.flatten(2) / temperature, dim=2)
    log_t = F.log_softmax(target.flatten(2) / temperature, dim=2)
    divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    return temperature**2 * divergence / max(student.shape[0] * student.shape[1], 1)


def pearson_distance(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute 1 - Pearson correlation (PKD; Cao et al., NeurIPS 2022, section 3), the mean over channels.

    A channel's correlation is over all its B * H * W values, so that neither net's scale or offset counts. A
    constant channel has no correlation: it counts 1.

    Args:
        student: (B, C, H, W).
        target: (B, C, H, W).

    Returns:
        A scalar in [0, 2].

    Example:
        >>> x = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3)
        >>> round(pearson_distance(10 - 2 * x, x).item(), 5)
        2.0
    """
    student, target = _checked(student, target)
    if student.numel() == 0:
        return student.sum()
    unit_s, unit_t = (_centred_unit(x.transpose(0, 1).flatten(1)) for x in (student, target))
    return 1 - (unit_s * unit_t).sum() / student.shape[1]


def attention_transfer(student: torch.Tensor, teacher: torch.Tensor, power: float = 2.0) -> torch.Tensor:
    """Compute activation-based attention transfer (Zagoruyko and Komodakis, ICLR 2017, section 3.1 and equation 2).

    An image's attention map is the sum over channels of ``|x|^power``, L2-normalised; the loss is the squared
    distance of the two maps, the mean over images.

    Args:
        student: (B, Cs, H, W).
        teacher: (B, Ct, H, W); Ct need not be Cs.
        power: >= 1; the larger, the more the strongest channel of a pixel counts.

    Returns:
        A scalar in [0, 2].

    Raises:
        ValueError: maps of different size.

    Example:
        >>> student = torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)
        >>> teacher = torch.tensor([[0.0, 1.0], [0.0, -3.0]]).view(1, 2, 1, 2)
        >>> attention_transfer(student, teacher).item()
        2.0
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in size")
    student, teacher = _at_least_float32(student), _at_least_float32(teacher.detach())
    maps = [F.normalize(_attention(x, power), dim=1) for x in (student, teacher)]
    return (maps[0] - maps[1]).square().sum() / max(student.shape[0], 1)


def _attention(x: torch.Tensor, power: float) -> torch.Tensor:
    """Return the attention maps (B, H * W) of (B, C, H, W), each image scaled to at most 1: no power overflows."""
    if x.numel() > 0:
        largest = x.detach().abs().flatten(1).amax(dim=1).view(-1, 1, 1, 1)
        x = x / torch.where(largest > 0, largest, 1.0)
    return x.abs().pow(power).sum(dim=1).flatten(1)


def _centred_unit(x: torch.Tensor) -> torch.Tensor:
    """Return (C, N), each row minus its mean, of length 1. A constant row is 0 and gets no gradient."""
    centred = x - x.mean(dim=1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    # A large constant minus its mean is a rounding error, not a variation. (A NaN compares as False, and so stays.)
    varies = ~(length <= 1e-6 * x.norm(dim=1, keepdim=True) + 1e-12)
    return torch.where(varies, centred / torch.where(varies, length, 1.0), 0.0)


def _checked(student: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    if student.shape != target.shape:
        raise ValueError(f"student {tuple(student.shape)} and target {tuple(target.shape)} differ in shape")
    return _at_least_float32(student), _at_least_float32(target.detach())


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
