"""Part "loss": reduction, loss and backward alone, in every way that there is, against copying as much memory.

The maps are those of RetinaNet R50 to R18 at COCO's size. A copy moves what the pass must move: see
``DistillationBenchmark.copies``.
"""

from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch

from gpu_check.measuring import Records, ratio_of, rounds, spreads
from gpu_check.speed import plain_torch
from mgd_det.benchmark import naive_partial_l2
from mgd_det.distillation.fused import amp_partial_l2, compiled

# Student and teacher channels, and the size of the maps, of res2 to res5.
_POSITIONS = [(64, 256, (200, 336)), (128, 512, (100, 168)), (256, 1024, (50, 84)), (512, 2048, (25, 42))]
_DRY_POSITIONS = [(8, 16, (10, 12)), (16, 64, (5, 6))]
# Under mixed precision the norm layer makes the student float32.
_DTYPES = [("float32", "float32"), ("float32", "float16"), ("bfloat16", "bfloat16")]
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_SECONDS = 1.5  # of rounds, for a setting

Maps = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Loss = Callable[..., torch.Tensor]


def measure_loss_pass(records: Records, dry_run: bool) -> None:
    """Measure each dtype and layout."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for student, teacher in _DTYPES:
        for layout in _LAYOUTS:
            about = {"student": student, "teacher": teacher, "layout": layout}
            records.measure(lambda a=about: _measure(a, device, dry_run), **about)


def _measure(about: Dict[str, Any], device: torch.device, dry_run: bool) -> Dict[str, Any]:
    positions, batch = (_DRY_POSITIONS, 1) if dry_run else (_POSITIONS, 16)
    dtypes = [getattr(torch, about[which]) for which in ("student", "teacher")]
    maps = [_maps(position, batch, dtypes, _LAYOUTS[about["layout"]], device) for position in positions]
    buffers = [(torch.empty_like(s), torch.empty_like(t[:, : t.shape[1] // 2])) for s, t, _, _ in maps]
    ways: Dict[str, Callable[[], Any]] = {
        "ours": lambda: _run(amp_partial_l2, maps),
        "plain": lambda: _run_plain(maps),
        "naive": lambda: _run(naive_partial_l2, maps),
        "copies": lambda: [_copy(m, b) for m, b in zip(maps, buffers)],
    }
    losses = {name: [float(x) for x in way()] for name, way in ways.items() if name != "copies"}
    times = rounds(ways, device, 0.0 if dry_run else _SECONDS)
    moved = sum(2 * (2 * to_student.nbytes + to_teacher.nbytes) for to_student, to_teacher in buffers)
    return {
        "compiled": compiled.is_for(*maps[0][:2]),
        "batch": batch,
        "times_s": spreads(times),
        "copy_bytes_per_s": moved / spreads(times)["copies"]["median"],
        "share_of_copy_bandwidth": ratio_of(times, "copies", "ours"),
        # Largest difference of a position's loss from that of the first way, as a part of it.
        "deviation": max(abs(x - y) / abs(y) for of in losses.values() for x, y in zip(of, losses["ours"])),
    }


def _maps(position: Any, batch: int, dtypes: Sequence[torch.dtype], layout: Any, device: torch.device) -> Maps:
    student, teacher, size = position
    generator = torch.Generator(device).manual_seed(0)
    s, t = (
        torch.randn(batch, channels, *size, device=device, generator=generator).to(dtype, memory_format=layout)
        for channels, dtype in zip((student, teacher), dtypes)
    )
    groups = torch.randperm(teacher, generator=torch.Generator().manual_seed(0)).view(student, -1).to(device)
    return s, t, torch.full((teacher,), -0.5, device=device), groups


def _run(loss: Loss, maps: List[Maps]) -> List[torch.Tensor]:
    values = []
    for student, teacher, margin, groups in maps:
        student = student.detach().requires_grad_()
        value = loss(student, teacher, margin, groups)
        torch.autograd.grad(value, student)
        values.append(value.detach())
    return values


def _run_plain(maps: List[Maps]) -> List[torch.Tensor]:
    with plain_torch():
        return _run(amp_partial_l2, maps)


def _copy(maps: Maps, buffers: Tuple[torch.Tensor, torch.Tensor]) -> None:
    to_student, to_teacher = buffers
    to_teacher.copy_(maps[1][:, : to_teacher.shape[1]])
    to_student.copy_(maps[0])
    to_student.copy_(maps[0])
