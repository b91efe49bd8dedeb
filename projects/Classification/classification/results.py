"""The rows of a study of classifiers, and its table."""

import re
from dataclasses import dataclass
from typing import Dict, List, Sequence

from accuracy_study.results import Training
from accuracy_study.statistics import mean_over_seeds, paired_difference
from accuracy_study.tables import BLOCK, NO_RESULTS, arms_of, markdown_table, scores_by_seed, shown_p, with_error


@dataclass(frozen=True)
class Accuracy(Training):
    """A row. The fields are the columns; ``config`` is a LazyConfig.

    Attributes:
        top1, top5: accuracy in percent.
        iterations: steps of the training.
        cpu_seconds: of the process, from the first line of the training to the end of its evaluation.
        teacher: first 12 digits of the SHA-256 of the teacher's weights; "" without a teacher.
        commit: of the code, with "+" if it was changed.
        torch: its version.
        hardware: the processor's name.
    """

    top1: float
    top5: float
    iterations: int
    cpu_seconds: float
    teacher: str
    commit: str
    torch: str
    hardware: str


def accuracy_table(rows: Sequence[Accuracy], base: str = "alone") -> str:
    """Return the table of means over the seeds, with the differences to an arm, paired by seed.

    Args:
        rows: of one study, in the order in which the arms are shown.
        base: the arm to compare with; without a row of it there are no differences.
    """
    lines: List[List[str]] = []
    reference = scores_by_seed(rows, base, "top1")
    for arm in arms_of(rows):
        of_arm = [row for row in rows if row.arm == arm]
        scores: Dict[int, float] = scores_by_seed(rows, arm, "top1")
        cells = [arm, str(len(of_arm)), with_error(mean_over_seeds(list(scores.values())))]
        difference = None if arm == base else paired_difference(scores, reference)
        cells.append("" if difference is None else with_error(difference.mean, signed=True))
        cells.append("" if difference is None else shown_p(difference.p))
        cells.append(f"{mean_over_seeds([row.cpu_seconds for row in of_arm]).value:.0f}")
        lines.append(cells)
    return markdown_table(["", "seeds", "top-1 accuracy", f"difference to {base}", "p", "CPU s"], lines)


def filled(text: str, rows: Dict[str, Sequence[Accuracy]]) -> str:
    """Return a page with its tables replaced: what stands between ``<!-- results: STUDY -->`` and its end.

    Args:
        text: of the page.
        rows: by the study's name.

    Raises:
        ValueError: a marker has no ``<!-- end of results -->``.
    """

    def replaced(match: "re.Match[str]") -> str:
        shown = rows.get(match["options"])
        table = f"{accuracy_table(shown)}\n" if shown else NO_RESULTS
        return f"{match[1]}{table}{match[4]}"

    made, number = BLOCK.subn(replaced, text)
    markers = re.findall(r"<!-- results: (.*?) -->", text)
    if number != len(markers):
        raise ValueError(f"one of the markers of the results of {markers} has no <!-- end of results -->")
    return made
