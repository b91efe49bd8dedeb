"""The pass in plain torch: for any device and type, and what :mod:`.compiled` compiles."""

from typing import Iterator, Tuple

import torch

from mgd_det.distillation.reducers import largest_in_magnitude

# Values of a block on the CPU. Its five temporaries stay in a core's cache; larger blocks were a little faster, but
# took up to half of the memory of the naive way on small maps.
_BLOCK = 1 << 15


def residual(
    student: torch.Tensor, teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor, factor: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute the residual, which backward needs, and the loss.

    Args:
        student: (B, Cs, H, W).
        teacher: (B, Ct, H, W).
        margin: (Cs,) <= 0, of the groups.
        groups: (Cs, K) long, in [0, Ct).
        factor: scalar > 0, of teacher and margin.

    Returns:
        (B, Cs, H, W) of the student's dtype: student - target where the loss counts it, else 0; and the sum of its
        squares, a scalar of float32 (float64 for a student of float64).
    """
    precision = torch.float64 if student.dtype == torch.float64 else torch.float32
    kept = torch.empty_like(student)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    margin = margin.to(student.device, precision).view(-1, 1, 1)
    factor = factor.to(student.device, precision)
    for images, channels in _blocks(student):
        difference = _difference(
            student[images, channels], teacher[images], margin[channels], groups[channels], factor, precision
        )
        total += difference.square().sum()
        kept[images, channels] = difference
    return kept, total.to(precision)


def residual_at_once(
    student: torch.Tensor, teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor, factor: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Do the same in float32 and without blocks; all tensors are on one device."""
    margin, factor = margin.float().view(-1, 1, 1), factor.float()
    difference = _difference(student, teacher, margin, groups, factor, torch.float32)
    return difference.to(student.dtype), difference.square().sum()


def _difference(
    student: torch.Tensor,
    teacher: torch.Tensor,
    margin: torch.Tensor,
    groups: torch.Tensor,
    factor: torch.Tensor,
    precision: torch.dtype,
) -> torch.Tensor:
    target = largest_in_magnitude(teacher, groups).to(precision)
    torch.maximum(target, margin, out=target).mul_(factor)
    is_silent = target <= 0
    difference = torch.sub(student, target, out=target)
    # Where the teacher is silent only a student above it counts. (A NaN compares as False, and so stays.)
    return difference.masked_fill_(is_silent.logical_and_(difference < 0), 0.0)


def scaled(residual: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return ``residual * factor`` in the residual's type, computed in that of the factor, a scalar."""
    # In half precision the factor alone, one part in millions of values, would underflow.
    return (residual.to(factor.dtype) * factor).to(residual.dtype)


def _blocks(student: torch.Tensor) -> Iterator[Tuple[slice, slice]]:
    """Yield the images and channels of each block: several whole images if they are small, else channels of one."""
    images, channels, pixels = student.shape[0], student.shape[1], max(student.shape[2:].numel(), 1)
    if student.device.type != "cpu":
        yield slice(0, images), slice(0, channels)
        return
    rows = min(max(_BLOCK // pixels, 1), channels)
    together = max(_BLOCK // (channels * pixels), 1) if rows == channels else 1
    for image in range(0, images, together):
        for channel in range(0, channels, rows):
            yield slice(image, image + together), slice(channel, channel + rows)
