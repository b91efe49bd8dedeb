"""The tables of a check in Markdown, and the section of a page that holds them."""

import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from gpu_check.parts import PARTS, ROOT
from mgd_det.errors import UserError

BEGIN, END = "<!-- made by dev/gpu_check.py -->\n", "<!-- end of dev/gpu_check.py -->"
NOT_RUN = "The check has not been run on a GPU yet.\n"
# Wanted: a distilled step takes no more than this times a plain step and the teacher's forward; and reduction and loss
# run at this share of a copy's bandwidth or more.
MOST_OF_BOTH, LEAST_OF_COPY = 1.05, 0.6

Rows = Sequence[Mapping[str, Any]]


def write_section(page: Path, content: str) -> None:
    """Replace what stands between the markers of a page.

    Raises:
        UserError: the page cannot be read, or does not have each marker once.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--page {page} cannot be read: {e}") from e
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"--page {page} must have the lines {BEGIN.strip()} and {END}, each once and in this order")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}{content}{END}{rest.split(END)[1]}", encoding="utf-8")


def section(results: Mapping[str, Any]) -> str:
    """Return all tables of a check's json.

    Raises:
        UserError: it is of a dry run, whose figures say nothing.
    """
    about = results["about"]
    if about["dry_run"]:
        raise UserError("the results are of a dry run, whose figures say nothing: run the check on a GPU")
    commit = f", commit {about['commit']}" if about["commit"] else ""
    lead = f"{about['device']}, torch {about['torch']}, Python {about['python']}{commit}.\n"
    return "\n".join([lead, *tables(results["parts"])])


def tables(parts: Mapping[str, Mapping[str, Any]]) -> List[str]:
    """Return the tables of the parts that ran, each with a line that explains it."""
    found = []
    for kind, make in _TABLES.items():
        names = [part.name for part in PARTS if part.kind == kind and part.name in parts]
        table = make({name: parts[name] for name in names}) if names else ""
        ended = [f"`{name}` {parts[name]['status']}" for name in names if parts[name]["status"] != "done"]
        if kind != "correct" and ended:
            table += f"\nNot complete: {', '.join(ended)}.\n"
        found += [table] if table else []
    return found


def _correct(parts: Mapping[str, Any]) -> str:
    lines = []
    for name, part in parts.items():
        tests: Mapping[str, str] = part["result"]
        counts = [sum(of == outcome for of in tests.values()) for outcome in ("PASSED", "FAILED", "SKIPPED", "ERROR")]
        lines.append([f"`{name}`", part["status"], *map(str, counts), f"{part['seconds']:.0f} s"])
    text = _table(["tests -m gpu", "", "passed", "failed", "skipped", "errors", "time"], lines)
    bad = [
        test for part in parts.values() for test, outcome in part["result"].items() if outcome in ("FAILED", "ERROR")
    ]
    return text + "".join(f"\n- `{test}` did not pass." for test in bad) + ("\n" if bad else "")


def _speed(parts: Mapping[str, Any]) -> str:
    rows = [row for part in parts.values() for row in part["result"]]
    lines, verdicts = [], []
    for row in rows:
        name = f"`{Path(row['config']).stem}`, {'mixed' if row['amp'] else 'float32'}, batch {row['batch']}"
        if "error" in row:
            lines.append([name, row["error"]])
            continue
        times, ratios = row["times_s"], row["ratios"]
        waits = row["host_waits"]
        share = ratios["copies / distillation part"]
        lines.append(
            [
                name,
                *(_ms(times.get(step)) for step in ("plain_step", "distilled_step", "teacher_bottom_up")),
                *(_spread(ratios[key]) for key in ("distilled / (plain + teacher)", "distilled / plain")),
                _spread(ratios["online / distilled"]),
                *(_ms(times.get(part)) for part in ("distillation_part", "plain_part", "naive_part")),
                _percent(share),
                " / ".join(f"{row['peak_bytes'][step] / 2**30:.1f}" for step in ("plain_step", "distilled_step")),
                " / ".join(str(waits[step]) for step in ("plain_step", "distilled_step")),
            ]
        )
        both = ratios["distilled / (plain + teacher)"]
        if both is None or both["median"] > MOST_OF_BOTH:
            verdicts.append(f"{name}: distilled / (plain + teacher) is {_spread(both)}, above {MOST_OF_BOTH}.")
        if share is not None and share["median"] < LEAST_OF_COPY:
            verdicts.append(f"{name}: reduction and loss reach {_percent(share)} of a copy's bandwidth, below 60 %.")
        if waits["distilled_step"] is not None and waits["distilled_step"] > waits["plain_step"]:
            verdicts.append(f"{name}: distillation adds {waits['distilled_step'] - waits['plain_step']} host waits.")
    headers = ["", "plain step", "distilled step", "teacher", "distilled / (plain + teacher)", "distilled / plain"]
    headers += ["online / distilled", "reduction and loss", "the same, plain torch", "naive", "of a copy's bandwidth"]
    headers += ["peak GiB, plain / distilled", "host waits, plain / distilled"]
    text = _table(headers, lines) + "".join(f"\n- Missed: {verdict}" for verdict in verdicts)
    profiles = [row for row in rows if "profile" in row]
    for row in profiles:
        text += f"\n\nOne distilled step of `{Path(row['config']).stem}`, batch {row['batch']}, by kernel:\n\n"
        text += "\n".join(f"    {line}" for line in row["profile"].splitlines())
    return text + "\n"


def _loss(parts: Mapping[str, Any]) -> str:
    lines = []
    for row in next(iter(parts.values()))["result"]:
        name = f"{row['student']}, {row['teacher']}, {row['layout'].replace('_', ' ')}"
        if "error" in row:
            lines.append([name, row["error"]])
            continue
        ways = (_ms(row["times_s"].get(way)) for way in ("ours", "plain", "naive", "copies"))
        lines.append(
            [
                name,
                "yes" if row["compiled"] else "no",
                *ways,
                _percent(row["share_of_copy_bandwidth"]),
                f"{row['copy_bytes_per_s'] / 1e12:.2f} TB/s",
                f"{row['deviation']:.0e}",
            ]
        )
    headers = ["reduction, loss and backward (student, teacher)", "compiled", "ours", "plain torch", "naive", "copies"]
    return _table([*headers, "of a copy's bandwidth", "copies move", "deviation"], lines)


def _teacher(parts: Mapping[str, Any]) -> str:
    lines = []
    for row in (row for part in parts.values() for row in part["result"]):
        options = ", ".join(f"`{key} {value}`" for key, value in row["options"].items()) or "default"
        name = f"{options}; student in {'mixed precision' if row['amp'] else 'float32'}"
        if "error" in row:
            lines.append([name, row["error"]])
            continue
        seconds = [row[f"{which}_pass_of_shapes_s"] for which in ("first", "second")]
        lines.append(
            [
                name,
                _ms(row["times_s"]["teacher_bottom_up"]),
                _spread(row["ratios"]["distilled / plain"]),
                f"{row['deviation']:.0e}",
                " / ".join(f"{value:.2f} s" for value in seconds),
            ]
        )
    headers = ["`MODEL.MGD.TEACHER.`", "bottom-up", "distilled / plain step", "deviation"]
    return _table([*headers, "images of several shapes, first / second pass"], lines)


def _accuracy(parts: Mapping[str, Any]) -> str:
    rows = next(iter(parts.values()))["result"]
    if not rows:
        return "No training was completed.\n"
    sys.path.insert(0, str(ROOT / "projects" / "AccuracyStudy"))
    from accuracy_study.results import Result
    from accuracy_study.tables import arms_of, difference_table, score_table

    results = [Result(**row) for row in rows]
    text = score_table(results)
    # Several at once share the card, so the times are not those of a training alone.
    return text + ("\n" + difference_table(results, ["alone"]) if len(arms_of(results)) > 1 else "")


_TABLES: Dict[str, Callable[[Mapping[str, Any]], str]] = {
    "correct": _correct,
    "speed": _speed,
    "loss": _loss,
    "teacher": _teacher,
    "accuracy": _accuracy,
}


# ------------------------------------------------------------------ cells
def _table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headers, ["---"] * len(headers), *([*line, *[""] * (len(headers) - len(line))] for line in lines)]
    # A bar would end the cell.
    return "".join("| " + " | ".join(re.sub(r"\|", "/", cell) for cell in row) + " |\n" for row in rows)


def _ms(spread: Optional[Mapping[str, float]]) -> str:
    return "" if spread is None else f"{1e3 * spread['median']:.1f} ms"


def _spread(spread: Optional[Mapping[str, float]]) -> str:
    return "" if spread is None else f"{spread['median']:.2f} ({spread['lower']:.2f} to {spread['upper']:.2f})"


def _percent(spread: Optional[Mapping[str, float]]) -> str:
    return "" if spread is None else f"{100 * spread['median']:.0f} %"
