"""Losses between a student feature and its target: functions of tensors.

Shape shorthand: B images, C channels, maps of H x W. Every loss is computed in float32, also under autocast
(float64 for float64 input). Only the student gets a gradient. For an empty batch, which has no mean, it is 0.

A mask (B, 1, H, W) >= 0 weights the pixels; see :mod:`mgd_det.distillation.masks`. One of 1 everywhere changes nothing,
and with one of 0 everywhere the loss is 0.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from mgd_det.errors import ArgumentError


def partial_l2(
    student: torch.Tensor,
    target: torch.Tensor,
    margin: torch.Tensor,
    reduction: str = "sum",
    mask: Optional[torch.Tensor] = None,
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
        mask: (B, 1, H, W), which multiplies the loss of each pixel.

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
    # A NaN compares as False, and so is not filled: a broken teacher or student must not look like a small loss.
    difference = student - target
    residual = difference.masked_fill((target <= 0) & (difference < 0), 0.0)
    loss = _masked(residual.square(), mask)
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


def plain_l2(student: torch.Tensor, target: torch.Tensor, mask: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Compute the mean squared difference of two (B, C, H, W) over all elements, a scalar.

    A mask (B, 1, H, W) multiplies the squared difference of each pixel; the mean is still over all elements.

    Example:
        >>> plain_l2(torch.zeros(1, 1, 1, 2), torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)).item()
        5.0
    """
    student, target = _checked(student, target)
    return _masked((student - target).square(), mask).sum() / max(student.numel(), 1)


def activation_boundary(
    student: torch.Tensor, target: torch.Tensor, margin: float = 1.0, mask: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Compute the transfer of activation boundaries (AB; Heo et al., AAAI 2019): a squared hinge.

    Where the teacher's neuron is active (``target > 0``) the loss is ``max(margin - student, 0)^2``, elsewhere
    ``max(margin + student, 0)^2``: only the sign of the target counts. The mean is over all elements.

    Args:
        student: (B, C, H, W), before its activation.
        target: (B, C, H, W), the reduced teacher feature before its activation.
        margin: > 0, how far the student must be on the teacher's side of 0.
        mask: (B, 1, H, W), which multiplies the loss of each pixel.

    Returns:
        A scalar >= 0.

    Example:
        >>> student = torch.tensor([0.5, -3.0, -0.5, 2.0]).view(1, 1, 1, 4)
        >>> target = torch.tensor([7.0, 0.1, -0.1, 2.0]).view(1, 1, 1, 4)
        >>> activation_boundary(student, target).item()
        4.125
    """
    student, target = _checked(student, target)
    hinge = torch.where(target > 0, margin - student, margin + student).clamp(min=0)
    hinge = hinge + torch.where(target.isnan(), target, 0.0)  # a NaN of the teacher is not silence
    return _masked(hinge.square(), mask).sum() / max(student.numel(), 1)


def channel_wise_kl(
    student: torch.Tensor, target: torch.Tensor, temperature: float = 1.0, mask: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Compute the loss of channel-wise knowledge distillation (CWD; Shu et al., ICCV 2021, section 3).

    Each channel's map becomes a distribution over its pixels, ``softmax(x / temperature)``; the loss is
    ``temperature^2 * KL(target || student)``, the mean over images and channels.

    Args:
        student: (B, C, H, W).
        target: (B, C, H, W).
        temperature: > 0; the larger, the more pixels count.
        mask: (B, 1, H, W). A pixel of weight w counts as w pixels of the same values: both distributions become
            proportional to ``w * exp(x / temperature)``. Only the ratios of an image's weights count.

    Returns:
        A scalar >= 0.

    Example:
        >>> round(channel_wise_kl(torch.zeros(1, 1, 1, 2), torch.tensor([0.0, 100.0]).view(1, 1, 1, 2)).item(), 4)
        0.6931
    """
    student, target = _checked(student, target)
    logits = [x.flatten(2) / temperature for x in (student, target)]
    if mask is not None:
        weight = mask.to(student).flatten(2)
        log_weight = torch.where(weight > 0, weight, 1.0).log()
        # Not -inf, which minus itself is NaN. An image without any weight has two equal distributions: a loss of 0.
        nothing = torch.finfo(student.dtype).min / 2
        logits = [torch.where(weight > 0, x + log_weight, nothing) for x in logits]
    log_s, log_t = (F.log_softmax(x, dim=2) for x in logits)
    divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    return temperature**2 * divergence / max(student.shape[0] * student.shape[1], 1)


def pearson_distance(student: torch.Tensor, target: torch.Tensor, mask: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Compute 1 - Pearson correlation (PKD; Cao et al., NeurIPS 2022, section 3), the mean over channels.

    A channel's correlation is over all its B * H * W values, so that neither net's scale or offset counts. A
    constant channel has no correlation: it counts 1.

    Args:
        student: (B, C, H, W).
        target: (B, C, H, W).
        mask: (B, 1, H, W), the weights of means, variances and covariances. Only their ratios count, over all images.

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
    weight = None if mask is None else _sum_of_one(mask.to(student).flatten())
    unit_s, unit_t = (_centred_unit(x.transpose(0, 1).flatten(1), weight) for x in (student, target))
    distance = 1 - (unit_s * unit_t).sum() / student.shape[1]
    return distance if weight is None else torch.where(weight.sum() > 0, distance, 0.0)


def attention_transfer(
    student: torch.Tensor, teacher: torch.Tensor, power: float = 2.0, mask: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Compute activation-based attention transfer (Zagoruyko and Komodakis, ICLR 2017, section 3.1 and equation 2).

    An image's attention map is the sum over channels of ``|x|^power``, L2-normalised; the loss is the squared
    distance of the two maps, the mean over images.

    Args:
        student: (B, Cs, H, W).
        teacher: (B, Ct, H, W); Ct need not be Cs.
        power: >= 1; the larger, the more the strongest channel of a pixel counts.
        mask: (B, 1, H, W), the weights of the pixels in the L2 norms and in the squared distance. Only the ratios of an
            image's weights count.

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
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if mask is None:
        maps = [F.normalize(_attention(x, power), dim=1) for x in (student, teacher)]
    else:
        # Values without weight must not set the scale of the others.
        mask = mask.to(student)
        root = mask.flatten(1).sqrt()
        maps = [F.normalize(root * _attention(x * (mask > 0), power), dim=1) for x in (student, teacher)]
    return (maps[0] - maps[1]).square().sum() / max(student.shape[0], 1)


def fsp_matrix(first: torch.Tensor, second: torch.Tensor, mask: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Return the matrix of the flow of solution procedure (FSP; Yim et al., CVPR 2017, equation 1).

    Entry i, j is the mean over pixels of the product of channel i of the first and channel j of the second map. The
    larger map is max-pooled to the size of the smaller.

    Args:
        first: (B, C1, H1, W1).
        second: (B, C2, H2, W2).
        mask: (B, 1, h, w) of the smaller map, the weights of that mean. Only the ratios of an image's weights count.

    Returns:
        (B, C1, C2).

    Example:
        >>> first = torch.tensor([[1.0, 2.0], [0.0, 3.0]]).view(1, 1, 2, 2)
        >>> fsp_matrix(first, torch.tensor([4.0, 5.0]).view(1, 2, 1, 1)).tolist()
        [[[12.0, 15.0]]]
    """
    maps = [at_least_float32(x) for x in (first, second)]
    size = min((tuple(x.shape[2:]) for x in maps), key=lambda size: size[0] * size[1])
    first, second = ((x if x.shape[2:] == size else F.adaptive_max_pool2d(x, size)).flatten(2) for x in maps)
    first = first / first.shape[2] if mask is None else first * _sum_of_one(mask.to(first).flatten(2))
    with torch.autocast(first.device.type, enabled=False):  # which would multiply in half precision
        return first @ second.transpose(1, 2)


def flow_of_solution(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared difference of two FSP matrices (B, C1, C2) (Yim et al., CVPR 2017, equation 2).

    The sum over the matrix's entries in the paper is a mean here, so that a weight means the same for any number of
    channels.

    Example:
        >>> flow_of_solution(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]])).item()
        5.0
    """
    return plain_l2(student, target)


def _attention(x: torch.Tensor, power: float) -> torch.Tensor:
    """Return the attention maps (B, H * W) of (B, C, H, W), each image scaled to at most 1: no power overflows."""
    if x.numel() > 0:
        largest = x.detach().abs().flatten(1).amax(dim=1).view(-1, 1, 1, 1)
        x = x / torch.where(largest > 0, largest, 1.0)
    return x.abs().pow(power).sum(dim=1).flatten(1)


def _centred_unit(x: torch.Tensor, weight: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Return (C, N), each row minus its mean, of length 1. A constant row is 0 and gets no gradient.

    With weights (N,) whose sum is 1, the mean is weighted, and what is left is multiplied by the weights' roots.
    """
    if weight is None:
        centred = x - x.mean(dim=1, keepdim=True)
    else:
        root = weight.sqrt()
        centred = (x - (x * weight).sum(dim=1, keepdim=True)) * root
        x = x * root
    length = centred.norm(dim=1, keepdim=True)
    # A large constant minus its mean is a rounding error, not a variation. (A NaN compares as False, and so stays.)
    varies = ~(length <= 1e-6 * x.norm(dim=1, keepdim=True) + 1e-12)
    return torch.where(varies, centred / torch.where(varies, length, 1.0), 0.0)


def _masked(loss: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    return loss if mask is None else loss * mask.to(loss)


def _sum_of_one(weight: torch.Tensor) -> torch.Tensor:
    """Return weights whose sum over the last dimension is 1, or 0 where all are 0."""
    total = weight.sum(dim=-1, keepdim=True)
    return weight / torch.where(total > 0, total, 1.0)


def _checked(student: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    if student.shape != target.shape:
        raise ValueError(f"student {tuple(student.shape)} and target {tuple(target.shape)} differ in shape")
    return at_least_float32(student), at_least_float32(target.detach())


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32 at least: a scalar's type does not count in a product, whose values may overflow."""
    return x if x.dtype == torch.float64 else x.float()
