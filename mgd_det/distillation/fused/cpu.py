"""The pass as a compiled loop for the CPU, cpu.c, which setup.py builds where there is a C compiler."""

import ctypes
import importlib.machinery
import logging
from functools import cache
from pathlib import Path
from typing import Any, Callable, Optional, Tuple

import torch

logger = logging.getLogger(__name__)

# Below so many values the threads would cost more than they save.
_VALUES_PER_THREAD = 1 << 14


def is_for(*maps: torch.Tensor) -> bool:
    """Whether :func:`residual` takes these maps: float32 on the CPU, and the loop was built."""
    return all(m.device.type == "cpu" and m.dtype == torch.float32 for m in maps) and _compiled() is not None


def residual(
    student: torch.Tensor, teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """As :func:`mgd_det.distillation.fused.reference.residual`, for maps that :func:`is_for` takes."""
    loop = _compiled()
    assert loop is not None
    images, channels = student.shape[:2]
    # Any other order of the values is brought to this one first; no caller's map is written.
    student, teacher, groups = student.contiguous(), teacher.contiguous(), groups.contiguous()
    margin = margin.to("cpu", torch.float32).contiguous()
    _check_range(groups, teacher.shape[1])
    difference = torch.empty_like(student)
    # One sum a plane, added up in their order: the same whatever the number of threads.
    sums = torch.zeros(images * channels, dtype=torch.float64)
    pointers = (t.data_ptr() for t in (student, teacher, margin, groups, difference, sums))
    threads = max(1, min(torch.get_num_threads(), student.numel() // _VALUES_PER_THREAD))
    sizes = (images, channels, teacher.shape[1], groups.shape[1], student.shape[2:].numel())
    loop(*pointers, *sizes, threads)
    return difference, sums.sum().to(torch.float32)


def _check_range(groups: torch.Tensor, channels: int) -> None:
    # The loop reads memory by them.
    if groups.numel() and not (0 <= int(groups.min()) and int(groups.max()) < channels):
        raise IndexError(f"groups name channels of {int(groups.min())} to {int(groups.max())}; there are {channels}")


@cache
def _compiled() -> Optional[Callable[..., Any]]:
    folder = Path(__file__).parent
    files = [folder / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    try:
        # Its OpenMP symbols are those of the library that torch has loaded.
        library = ctypes.CDLL(str(next(file for file in files if file.is_file())))
    except (StopIteration, OSError) as e:
        reason = f"{e}" or "it was not built"
        logger.warning(
            f"The compiled loop of the distillation loss is not there ({reason}): plain torch takes its place, five "
            "times slower. Install a C compiler and this package again to have it."
        )
        return None
    loop = library.mgd_amp_partial_l2
    loop.restype = None
    loop.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 5 + [ctypes.c_int]
    return loop
