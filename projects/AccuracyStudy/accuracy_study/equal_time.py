"""How many iterations a plain student gets in the time of a distilled one."""

from statistics import median
from typing import Any, Dict, Iterable, Mapping, Sequence

from accuracy_study.results import Result, overrides_of_text
from mgd_det.errors import UserError

SCHEDULE_KEYS = ("SOLVER.MAX_ITER", "SOLVER.STEPS")


def time_ratio(plain: Iterable[Result], other: Iterable[Result]) -> float:
    """Return how many times as long as ``plain`` the trainings ``other`` took: the median over the seeds of both.

    Only results of one seed on one device are compared. On the CPU their CPU time counts, which other work on the
    machine changes least; on a GPU their wall-clock time.

    Raises:
        UserError: no seed has both.
    """
    of_plain = {(row.seed, row.device, row.hardware): row for row in plain}
    ratios = []
    for row in other:
        paired = of_plain.get((row.seed, row.device, row.hardware))
        if paired is not None:
            key = "cpu_seconds" if row.device == "cpu" else "seconds"
            ratios.append(getattr(row, key) / getattr(paired, key))
    if not ratios:
        raise UserError("no seed has a result of both arms on the same hardware, so their times cannot be compared")
    return median(ratios)


def longer_schedule(max_iter: int, steps: Sequence[int], ratio: float) -> Dict[str, Any]:
    """Return the overrides of a schedule that is ``ratio`` times as long, with its steps in proportion."""
    iterations = max(round(max_iter * ratio), 1)
    return {"SOLVER.MAX_ITER": iterations, "SOLVER.STEPS": [round(step * iterations / max_iter) for step in steps]}


def schedule_of(row: Result) -> Dict[str, str]:
    """Return the overrides of the schedule that a row was trained with."""
    overrides: Mapping[str, str] = overrides_of_text(row.overrides)
    return {key: overrides[key] for key in SCHEDULE_KEYS}
