"""Tables of results in Markdown."""

import re
from typing import Dict, List, Optional, Sequence

from accuracy_study.results import Result
from accuracy_study.statistics import Mean, mean_over_seeds, paired_difference
from mgd_det.errors import UserError, did_you_mean

# Where a page has a table: between the end of a marker and the next <!-- end of results -->.
BLOCK = re.compile(r"(<!-- results: (?P<options>.*?) -->\n)(?P<content>.*?)(<!-- end of results -->)", re.DOTALL)
NO_RESULTS = "There are no results yet.\n"
_SCORES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "mask_AP": "mask AP"}


def select(rows: Sequence[Result], arms: Optional[Sequence[str]], evaluation_set: Optional[str]) -> List[Result]:
    """Return the rows of some arms, in this order, on one set.

    Args:
        rows: all of a study.
        arms: None for all, in the order of their first rows.
        evaluation_set: None for the set that the first row has.

    Raises:
        UserError: the rows have no such arm or set.
    """
    known, sets = arms_of(rows), list(dict.fromkeys(row.evaluation_set for row in rows))
    if evaluation_set is not None and evaluation_set not in sets:
        raise UserError(
            f"there is no result on {evaluation_set!r}.{did_you_mean(evaluation_set, sets)} There is {sets}"
        )
    for arm in arms or ():
        if arm not in known:
            raise UserError(f"there is no result of the arm {arm!r}.{did_you_mean(arm, known)} There is {known}")
    chosen = evaluation_set or (sets[0] if sets else "")
    return [row for arm in arms or known for row in rows if row.arm == arm and row.evaluation_set == chosen]


def arms_of(rows: Sequence[Result]) -> List[str]:
    """Return the arms in the order of their first rows."""
    return list(dict.fromkeys(row.arm for row in rows))


def scores_by_seed(rows: Sequence[Result], arm: str, score: str = "AP") -> Dict[int, float]:
    """Return a score of an arm by seed."""
    return {row.seed: getattr(row, score) for row in rows if row.arm == arm}


def score_table(rows: Sequence[Result]) -> str:
    """Return the table of means: a line for each arm of the rows, which are of one set.

    The training time is that of the rows of one machine, the first row's: the process's CPU time if it is a CPU,
    otherwise wall-clock time.
    """
    scores = [score for score in _SCORES if any(getattr(row, score) is not None for row in rows)]
    on_cpu = bool(rows) and rows[0].device == "cpu"
    headers = ["", "seeds", "iterations", "CPU s" if on_cpu else "s", *(_SCORES[score] for score in scores)]
    lines = []
    for arm in arms_of(rows):
        of_arm = [row for row in rows if row.arm == arm]
        timed = [row for row in of_arm if row.hardware == rows[0].hardware]
        seconds = [row.cpu_seconds if on_cpu else row.seconds for row in timed]
        cells = [arm, str(len(of_arm)), _iterations(rows, arm)]
        cells.append(f"{mean_over_seeds(seconds).value:.0f}" if seconds else "")
        for score in scores:
            values = [getattr(row, score) for row in of_arm if getattr(row, score) is not None]
            cells.append(with_error(mean_over_seeds(values)) if values else "")
        lines.append(cells)
    return markdown_table(headers, lines)


def difference_table(rows: Sequence[Result], against: Sequence[str], score: str = "AP") -> str:
    """Return the table of paired differences of each arm to the arms ``against``.

    Raises:
        UserError: there is no result of an arm of ``against``.
    """
    known = arms_of(rows)
    for base in against:
        _scores_of(rows, base)
    lines = []
    for base in against:
        for arm in known:
            if arm == base or (arm in against and against.index(arm) < against.index(base)):
                continue
            difference = paired_difference(scores_by_seed(rows, arm, score), scores_by_seed(rows, base, score))
            if difference is not None:
                cells = [f"{arm} - {base}", str(difference.mean.n), with_error(difference.mean, signed=True)]
                lines.append([*cells, shown_p(difference.p)])
    return markdown_table(["", "pairs", f"difference in {_SCORES[score]}", "p"], lines)


def gain_table(rows: Sequence[Result], pairs: Sequence[Sequence[str]], score: str = "AP") -> str:
    """Return the table of what distillation gains: a line for each pair, paired by seed.

    Args:
        rows: of one set.
        pairs: arms (distilled, alone).
        score: "AP" or "mask_AP".

    Raises:
        UserError: there is no result of an arm.
    """
    name, lines = _SCORES[score], []
    for arms in pairs:
        distilled, alone = _on_common_seeds(rows, arms, score)
        difference = paired_difference(distilled, alone)
        if difference is None:
            continue
        means = [mean_over_seeds(list(scores.values())) for scores in (alone, distilled)]
        cells = [f"{arms[0]} - {arms[1]}", str(len(alone)), _iterations(rows, arms[1]), *map(with_error, means)]
        lines.append([*cells, with_error(difference.mean, signed=True), shown_p(difference.p)])
    headers = ["", "pairs", "iterations alone", f"{name} alone", f"{name} distilled", f"difference in {name}", "p"]
    return markdown_table(headers, lines)


def gap_table(rows: Sequence[Result], teacher: str, pairs: Sequence[Sequence[str]]) -> str:
    """Return the table of how much of the gap between a student alone and its teacher distillation closes.

    That is (distilled - alone) / (teacher - alone) for each seed that both arms have, in percent.

    Args:
        rows: of one set.
        teacher: the arm of the teacher, which has one row (eval_only) or several, whose mean counts.
        pairs: arms (distilled, alone), such as one pair for each length of the schedule.

    Raises:
        UserError: there is no result of an arm.
    """
    teacher_ap = mean_over_seeds(list(_scores_of(rows, teacher).values())).value
    lines = []
    for distilled, alone in pairs:
        with_teacher, without = (list(scores.values()) for scores in _on_common_seeds(rows, (distilled, alone)))
        if not without:
            continue
        closed = [100 * (d - a) / (teacher_ap - a) for d, a in zip(with_teacher, without) if a < teacher_ap]
        iterations = dict.fromkeys(_iterations(rows, arm) for arm in (distilled, alone))
        cells = [f"{distilled}, {alone}", str(len(without)), ", ".join(iterations)]
        cells += [with_error(mean_over_seeds(values)) for values in (without, with_teacher)]
        # Where a student alone is as good as the teacher, there is no gap.
        shown = f"{with_error(mean_over_seeds(closed))} %" if len(closed) == len(without) else "-"
        lines.append([*cells, f"{teacher_ap:.2f}", shown])
    return markdown_table(["", "pairs", "iterations", "AP alone", "AP distilled", "AP teacher", "gap closed"], lines)


def _iterations(rows: Sequence[Result], arm: str) -> str:
    return "/".join(str(n) for n in sorted({row.iterations for row in rows if row.arm == arm}))


def _scores_of(rows: Sequence[Result], arm: str, score: str = "AP") -> Dict[int, float]:
    """Return a score of an arm by seed.

    Raises:
        UserError: there is no result of it, or it has no such score.
    """
    known = arms_of(rows)
    if arm not in known:
        raise UserError(f"there is no result of the arm {arm!r}.{did_you_mean(arm, known)} There is {known}")
    scores = scores_by_seed(rows, arm, score)
    if None in scores.values():
        raise UserError(f"the arm {arm!r} has no {_SCORES[score]}: its detector has no masks")
    return scores


def _on_common_seeds(rows: Sequence[Result], arms: Sequence[str], score: str = "AP") -> List[Dict[int, float]]:
    """Return the scores of each arm by seed, in the order of the seeds that all of them have.

    Raises:
        UserError: there is no result of an arm, or it has no such score.
    """
    scores = [_scores_of(rows, arm, score) for arm in arms]
    seeds = sorted(set.intersection(*map(set, scores)))
    return [{seed: of_arm[seed] for seed in seeds} for of_arm in scores]


def provenance(rows: Sequence[Result]) -> str:
    """Return the sentence that says what the rows were measured with."""

    def different(column: str) -> str:
        return ", ".join(dict.fromkeys(getattr(row, column) for row in rows if getattr(row, column)))

    parts = [f"Scores on {different('evaluation_set')}", different("hardware"), f"torch {different('torch')}"]
    parts += [f"commit {different('commit')}"] if different("commit") else []
    parts += [f"teacher {different('teacher')}"] if different("teacher") else []
    return "; ".join(parts) + "."


def with_error(mean: Mean, signed: bool = False) -> str:
    """Return "12.34 ± 0.56"."""
    value = f"{mean.value:+.2f}" if signed else f"{mean.value:.2f}"
    return value if mean.error is None else f"{value} ± {mean.error:.2f}"


def shown_p(p: Optional[float]) -> str:
    """Return p with three decimals, or what it is below."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def markdown_table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table as the documents of this project have it."""
    rule = "|" + "---|" * len(headers)
    first, *rest = ("| " + " | ".join(row) + " |" for row in (headers, *lines))
    return "\n".join([first, rule, *rest])
