"""The pass as a Triton kernel for CUDA.

Tests run it on the CPU too, by Triton's interpreter (environment variable TRITON_INTERPRET=1). Shape shorthand: B
images, Cs student channels in groups of K teacher channels, P pixels of a map.
"""

import logging
from functools import cache
from typing import Tuple

import torch

from mgd_det.distillation.fused import reference
from mgd_det.errors import first_line

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU, macOS or Windows
    triton = None

logger = logging.getLogger(__name__)

# Values of a program's tile.
_TILE = 1024
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_for(*maps: torch.Tensor) -> bool:
    """Return whether :func:`residual` takes these maps: float32, float16 or bfloat16, on a GPU that runs it."""
    return triton is not None and all(m.is_cuda and m.dtype in _TYPES for m in maps) and runs_on(maps[0].device)


@cache
def runs_on(device: torch.device) -> bool:
    """Return whether the kernels run on a device and agree with plain torch; if not, a warning says why."""
    teacher = torch.tensor([1.0, -3, 2, -0.5, -2, 3, -4, 0.25, 0.5, -1, 1, 0.75], device=device).view(1, 3, 2, 2)
    student = teacher[:, :2].flip(1)
    groups = torch.tensor([[0, 1], [2, 0]], device=device)
    maps = student, teacher, -torch.ones(2, device=device), groups, torch.tensor(0.5, device=device)
    try:
        (difference, total), (expected, expected_total) = residual(*maps), reference.residual(*maps)
        torch.testing.assert_close((difference, total), (expected, expected_total))
        gradient = expected_total.new_tensor(0.5)
        torch.testing.assert_close(scaled(difference, gradient), reference.scaled(expected, gradient))
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as e:  # an old Triton or GPU, no C compiler for Triton's launcher: each raises its own kind
        logger.warning(
            f"The Triton kernel of the distillation loss does not run on {device} ({first_line(e)}): plain "
            "torch is used instead, which is slower and needs more memory."
        )
        return False
    return True


def residual(
    student: torch.Tensor, teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor, factor: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`mgd_det.distillation.fused.reference.residual`, for maps that :func:`is_for` takes.

    Each map is read in the order in which it lies in memory, contiguous or channels_last, and moved once.
    """
    images, channels, height, width = student.shape
    student, teacher = _with_one_pixel_stride(student), _with_one_pixel_stride(teacher)
    difference = torch.empty_like(student)
    if student.numel() == 0:
        return difference, torch.zeros((), device=student.device)
    pixels = height * width
    # A tile is as long as possible in the direction in which the teacher, the largest map, lies in memory.
    if teacher.stride(1) == 1 and teacher.shape[1] > 1:
        tile_channels = min(triton.next_power_of_2(channels), _TILE // 4)
        tile_pixels = min(triton.next_power_of_2(pixels), max(_TILE // tile_channels, 1))
    else:
        tile_pixels = min(triton.next_power_of_2(pixels), _TILE)
        tile_channels = min(triton.next_power_of_2(channels), max(_TILE // tile_pixels, 1))
    grid = (triton.cdiv(pixels, tile_pixels), triton.cdiv(channels, tile_channels), images)
    # One sum a program, added up in their order: no atomic addition, whose result varies from run to run.
    sums = torch.empty(grid, dtype=torch.float32, device=student.device)
    with _device_of(student):
        _residual_kernel[grid](
            student,
            teacher,
            margin.to(student.device, torch.float32).contiguous(),
            groups.contiguous(),
            factor.to(student.device, torch.float32),
            difference,
            sums,
            channels,
            pixels,
            *_strides(student),
            *_strides(teacher),
            *_strides(difference),
            MEMBERS=groups.shape[1],
            TILE_CHANNELS=tile_channels,
            TILE_PIXELS=tile_pixels,
        )
    return difference, sums.sum(dtype=torch.float64).to(torch.float32)


def scaled(residual: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return ``residual * factor`` in the residual's type, computed in float32; ``factor`` is a scalar there."""
    result = torch.empty_like(residual)
    if residual.numel() > 0:
        with _device_of(residual):
            _scale_kernel[(triton.cdiv(residual.numel(), _TILE),)](
                residual, factor.float(), result, residual.numel(), TILE=_TILE
            )
    return result


def _with_one_pixel_stride(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, or a copy if its pixels are not evenly spaced in memory, as in a crop."""
    height, width = x.shape[2:]
    is_even = width <= 1 or height <= 1 or x.stride(2) == width * x.stride(3)
    is_dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if is_even and is_dense else x.contiguous()


def _strides(x: torch.Tensor) -> Tuple[int, int, int]:
    """Return the strides of an image, a channel and a pixel."""
    return x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2)


def _device_of(x: torch.Tensor) -> "torch.cuda.device":
    # Triton launches on the current device, not on the tensors'; -1 changes nothing.
    return torch.cuda.device(x.device if x.is_cuda else -1)


if triton is not None:

    @triton.jit
    def _residual_kernel(
        student,
        teacher,
        margin,
        groups,
        factor,
        residual,
        sums,
        channels,
        pixels,
        student_image,
        student_channel,
        student_pixel,
        teacher_image,
        teacher_channel,
        teacher_pixel,
        residual_image,
        residual_channel,
        residual_pixel,
        MEMBERS: tl.constexpr,
        TILE_CHANNELS: tl.constexpr,
        TILE_PIXELS: tl.constexpr,
    ):
        image = tl.program_id(2).to(tl.int64)
        c = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
        p = (tl.program_id(0) * TILE_PIXELS + tl.arange(0, TILE_PIXELS)).to(tl.int64)
        in_map = (c[:, None] < channels) & (p[None, :] < pixels)
        teacher += image * teacher_image + p[None, :] * teacher_pixel
        j = tl.load(groups + c * MEMBERS, mask=c < channels, other=0)
        high = tl.load(teacher + j[:, None] * teacher_channel, mask=in_map, other=0.0).to(tl.float32)
        low = high
        for k in tl.static_range(1, MEMBERS):
            j = tl.load(groups + c * MEMBERS + k, mask=c < channels, other=0)
            member = tl.load(teacher + j[:, None] * teacher_channel, mask=in_map, other=0.0).to(tl.float32)
            high = tl.maximum(high, member, propagate_nan=tl.PropagateNan.ALL)
            low = tl.minimum(low, member, propagate_nan=tl.PropagateNan.ALL)
        m = tl.load(margin + c, mask=c < channels, other=0.0)
        target = tl.maximum(tl.where(high >= -low, high, low), m[:, None], propagate_nan=tl.PropagateNan.ALL)
        target *= tl.load(factor)
        c = c.to(tl.int64)
        student += image * student_image + c[:, None] * student_channel + p[None, :] * student_pixel
        difference = tl.load(student, mask=in_map, other=0.0).to(tl.float32) - target
        # Where the teacher is silent only a student above it counts.
        above = tl.maximum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL)
        difference = tl.where(in_map, tl.where(target > 0, difference, above), 0.0)
        residual += image * residual_image + c[:, None] * residual_channel + p[None, :] * residual_pixel
        tl.store(residual, difference.to(residual.dtype.element_ty), mask=in_map)
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        tl.store(sums + program, tl.sum(difference * difference))

    @triton.jit
    def _scale_kernel(residual, factor, result, size, TILE: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        value = tl.load(residual + i, mask=i < size, other=0.0).to(tl.float32) * tl.load(factor)
        tl.store(result + i, value.to(result.dtype.element_ty), mask=i < size)
