"""The table of latencies by runtime, with the AP of the arms beside them."""

from typing import Mapping, Sequence

from accuracy_study.latency import Measurement, detectors_of_arms
from accuracy_study.results import Result
from accuracy_study.statistics import mean_over_seeds
from accuracy_study.tables import markdown_table, scores_by_seed, with_error


def latency_table(rows: Sequence[Result], measurements: Sequence[Measurement], named: Mapping[str, str]) -> str:
    """Return a table with a line for each detector: its latency in each runtime, and the AP of the arms that are it.

    Args:
        rows: the results, of one set.
        measurements: of one size; those of parts of a detector are left out.
        named: the detector of an arm that has another name (:func:`accuracy_study.latency.detectors_of_arms`).

    Returns:
        The table. The times are medians, with their ratio to PyTorch with the first detector in parentheses.

    Raises:
        UserError: ``named`` has a detector that was not measured.
    """
    shown = [row for row in measurements if not row.measured.startswith("part:")]
    runtimes, detectors = ([*dict.fromkeys(getattr(row, key) for row in shown)] for key in ("measured", "detector"))
    cells = {(row.detector, row.measured): f"{_milliseconds(row.latency.median)} ms ({row.ratio:.2f})" for row in shown}
    arms = detectors_of_arms(rows, detectors, named)
    lines = []
    for detector in detectors:
        scores = [
            f"{arm} {with_error(mean_over_seeds(list(scores_by_seed(rows, arm).values())))}"
            for arm, of_arm in arms.items()
            if of_arm == detector
        ]
        lines.append([detector, *(cells.get((detector, runtime), "") for runtime in runtimes), "<br>".join(scores)])
    return markdown_table(["", *runtimes, "AP"], lines)


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
