"""The picture of AP over latency, from a study and the csv of tools/benchmark.py --inference."""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence

from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from accuracy_study.curves import FINGERPRINT
from accuracy_study.results import Result
from accuracy_study.statistics import mean_over_seeds
from accuracy_study.tables import arms_of
from mgd_det.errors import UserError, did_you_mean
from mgd_det.visualization.figures import color, new_figure

_MARKERS = "osD^vP"  # with the colors, for as many arms as anybody can tell apart


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one image: the median over the rounds, and the ends of the middle half of them."""

    median: float
    lower: float
    upper: float


def read_latency(path: Path, runtime: str, size: str) -> Dict[str, Latency]:
    """Return the latency of each detector of a csv of tools/benchmark.py --inference.

    Args:
        path: the csv.
        runtime: such as "ONNX Runtime", of the column "measured".
        size: height and width, "320x320".

    Raises:
        UserError: the file cannot be read, or has no such row.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for column, value in (("measured", runtime), ("size", size)):
            known = list(dict.fromkeys(row[column] for row in rows))
            if value not in known:
                raise UserError(
                    f"latency {path} has no row with {column} {value!r}.{did_you_mean(value, known)} It has {known}"
                )
        chosen = [row for row in rows if (row["measured"], row["size"]) == (runtime, size)]
        return {
            row["detector"]: Latency(float(row["median_ms"]), float(row["lower_ms"]), float(row["upper_ms"]))
            for row in chosen
        }
    except (OSError, UnicodeDecodeError, KeyError, ValueError) as e:
        raise UserError(
            f"latency {path} cannot be read ({type(e).__name__}: {e}): make it by tools/benchmark.py --inference --csv"
        ) from e


def latency_of_arms(rows: Sequence[Result], latency: Dict[str, Latency]) -> Dict[str, Latency]:
    """Return the latency of each arm that has one: under its own name, or else under the name of its config's file.

    Raises:
        UserError: no arm has one.
    """
    found: Dict[str, Latency] = {}
    for arm in arms_of(rows):
        config = next(row.config for row in rows if row.arm == arm)
        name = arm if arm in latency else Path(config).stem
        if name in latency:
            found[arm] = latency[name]
    if not found:
        raise UserError(f"no arm of {arms_of(rows)}, nor its config, is among the detectors {list(latency)}")
    return found


def latency_fingerprint(rows: Sequence[Result], latency: Dict[str, Latency], runtime: str, size: str) -> str:
    """Return a hash of all that the picture shows."""
    shown = [(row.arm, row.seed, row.AP) for row in rows if row.arm in latency]
    return hashlib.sha256(repr((shown, latency, runtime, size)).encode("utf-8")).hexdigest()[:16]


def draw_latency(rows: Sequence[Result], latency: Dict[str, Latency], runtime: str, size: str, path: Path) -> None:
    """Draw AP over latency, a point for each arm of rows of one set that has a latency.

    The bars are the standard error of AP over the seeds, and the middle half of the rounds of the measurement. Arms of
    the same latency, such as a student alone and distilled, have one color, and a thin line joins them. The axis of
    latencies is logarithmic where they differ by more than a factor of five.
    """
    figure = new_figure(9, 5)
    axes = figure.subplots()
    of_latency: Dict[float, List[float]] = {}
    for arm, ms in latency.items():
        ap = mean_over_seeds([row.AP for row in rows if row.arm == arm])
        values = of_latency.setdefault(ms.median, [])
        group = list(of_latency).index(ms.median)
        axes.errorbar(
            ms.median,
            ap.value,
            xerr=[[ms.median - ms.lower], [ms.upper - ms.median]],
            yerr=ap.error or 0.0,
            color=color(group),
            marker=_MARKERS[(len(values) + group // 7 * 2) % len(_MARKERS)],  # colors repeat after seven
            markersize=7,
            linestyle="none",
            capsize=3,
            label=arm,
        )
        values.append(ap.value)
    for ms_median, values in of_latency.items():
        axes.plot([ms_median] * 2, [min(values), max(values)], color="#999999", linewidth=1, zorder=0)
    axes.set(xlabel=f"ms for an image of {size}, {runtime}", ylabel="AP")
    if max(of_latency) > 5 * min(of_latency):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {FINGERPRINT: latency_fingerprint(rows, latency, runtime, size)}
    figure.savefig(path, dpi=100, format="png", metadata=metadata)
