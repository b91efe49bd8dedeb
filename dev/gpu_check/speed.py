"""Part "speed": steps of a detector at COCO's size, with and without distillation."""

import gc
from contextlib import contextmanager
from typing import Any, Dict, Iterator
from unittest import mock

from gpu_check.measuring import (
    BATCHES,
    DRY_SIZE,
    FULL_SIZE,
    Records,
    config_of,
    host_waits,
    ratio_of,
    rounds,
    spreads,
)
from mgd_det.benchmark import DistillationBenchmark, peak_bytes
from mgd_det.cli.benchmark import profile
from mgd_det.distillation.fused import compiled

_SECONDS = 5.0  # of rounds, for a setting


def measure_steps(config: str, records: Records, dry_run: bool) -> None:
    """Measure float32 and mixed precision with large batches, then with small ones."""
    size, batches = (DRY_SIZE, (1,)) if dry_run else (FULL_SIZE, BATCHES)
    seconds = 0.0 if dry_run else _SECONDS
    for batch in batches:
        for amp in (True,) if dry_run else (False, True):
            settings = {"config": config, "size": list(size), "batch": batch, "amp": amp}
            with_profile = amp and batch == batches[0] and "R_18" in config
            records.measure(lambda s=settings, p=with_profile: _steps(s, seconds, dry_run, p), **settings)
            gc.collect()
    recommended = config.replace("_1x.yaml", "_recommended_1x.yaml")
    if "R_18" in config:
        settings = {"config": recommended, "size": list(size), "batch": batches[0], "amp": True}
        records.measure(lambda: _steps(settings, seconds, dry_run, False), **settings)


def _steps(settings: Dict[str, Any], seconds: float, dry_run: bool, with_profile: bool) -> Dict[str, Any]:
    cfg = config_of(settings["config"], ["SOLVER.AMP.ENABLED", str(settings["amp"])], dry_run)
    bench = DistillationBenchmark(cfg, size=tuple(settings["size"]), batch=settings["batch"])
    steps = {"plain_step": bench.plain_step, "distilled_step": bench.distilled_step}
    functions = {**steps, "teacher_bottom_up": bench.teacher_bottom_up}
    if bench.positions:
        functions.update(
            online_step=bench.online_step,
            distillation_part=lambda: [bench.distillation_part(p) for p in bench.positions],
            plain_part=lambda: _plain_part(bench),
            naive_part=lambda: [bench.naive_part(p) for p in bench.positions],
            copies=lambda: [bench.copies(p) for p in bench.positions],
        )
    times = rounds(functions, bench.device, seconds)
    over_both = ratio_of(times, "distilled_step", "plain_step", "teacher_bottom_up")
    result: Dict[str, Any] = {
        "times_s": spreads(times),
        "rounds": len(times["plain_step"]),
        "peak_bytes": {name: peak_bytes(step, bench.device) for name, step in steps.items()},
        "host_waits": {name: host_waits(step, bench.device) for name, step in steps.items()},
        "ratios": {
            "distilled / (plain + teacher)": over_both,
            "distilled / plain": ratio_of(times, "distilled_step", "plain_step"),
            "online / distilled": ratio_of(times, "online_step", "distilled_step"),
            "plain torch / distillation part": ratio_of(times, "plain_part", "distillation_part"),
            "naive / distillation part": ratio_of(times, "naive_part", "distillation_part"),
            "copies / distillation part": ratio_of(times, "copies", "distillation_part"),
        },
    }
    if bench.positions:
        moved = sum(bench.copied_bytes(p) for p in bench.positions)
        result["copy_bytes_per_s"] = moved / result["times_s"]["copies"]["median"]
    if with_profile:
        result["profile"] = profile(bench)
    return result


def _plain_part(bench: DistillationBenchmark) -> None:
    with plain_torch():
        for position in bench.positions:
            bench.distillation_part(position)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Compute reduction and loss without compiled code."""
    with mock.patch.object(compiled, "is_for", lambda *maps: False):
        yield
