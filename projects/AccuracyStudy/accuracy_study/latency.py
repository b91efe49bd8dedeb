"""The picture of AP over latency, from a study and the csv of tools/benchmark.py --inference."""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Collection, Dict, List, Mapping, Sequence

from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from accuracy_study.curves import FINGERPRINT
from accuracy_study.results import Result, overrides_of_text
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


@dataclass(frozen=True)
class Measurement:
    """A row of the csv: a detector, or a part of it, at a size.

    Attributes:
        detector, size, measured: the columns, such as "light", "320x320" and "ONNX Runtime".
        latency: the milliseconds.
        ratio: to PyTorch with the first detector at this size, the median of the ratios of the rounds.
    """

    detector: str
    size: str
    measured: str
    latency: Latency
    ratio: float


def read_measurements(path: Path) -> List[Measurement]:
    """Return the rows of a csv of tools/benchmark.py --inference.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [
                Measurement(
                    row["detector"],
                    row["size"],
                    row["measured"],
                    Latency(*(float(row[f"{name}_ms"]) for name in ("median", "lower", "upper"))),
                    float(row["ratio"]),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"latency {path} cannot be read ({type(e).__name__}: {e}): make it by tools/benchmark.py --inference --csv"
        ) from e


def measured_at(measurements: Sequence[Measurement], size: str, path: Path) -> List[Measurement]:
    """Return the measurements at a size.

    Raises:
        UserError: there is none.
    """
    return _chosen(measurements, "size", size, path)


def read_latency(path: Path, runtime: str, size: str) -> Dict[str, Latency]:
    """Return the latency of each detector of a csv of tools/benchmark.py --inference.

    Args:
        path: the csv.
        runtime: such as "ONNX Runtime", of the column "measured".
        size: height and width, "320x320".

    Raises:
        UserError: the file cannot be read, or has no such row.
    """
    chosen = _chosen(_chosen(read_measurements(path), "measured", runtime, path), "size", size, path)
    return {row.detector: row.latency for row in chosen}


def _chosen(measurements: Sequence[Measurement], column: str, value: str, path: Path) -> List[Measurement]:
    known = list(dict.fromkeys(getattr(row, column) for row in measurements))
    if value not in known:
        raise UserError(
            f"latency {path} has no row with {column} {value!r}.{did_you_mean(value, known)} It has {known}"
        )
    return [row for row in measurements if getattr(row, column) == value]


def detectors_of_arms(rows: Sequence[Result], detectors: Collection[str], named: Mapping[str, str]) -> Dict[str, str]:
    """Return which detector of the csv each arm is; arms without one are left out.

    An arm is the detector that ``named`` has for it, or else the one of its own name, or else the one of its config's
    file, without "_mgd_..." for a student that is distilled: a student alone and distilled take as long. An arm whose
    overrides change the network is not the one of its config's file.

    Raises:
        UserError: ``named`` has a detector that was not measured.
    """
    for arm, detector in named.items():
        if detector not in detectors:
            raise UserError(
                f"detectors has {arm}: {detector!r}, which was not measured.{did_you_mean(detector, detectors)} "
                f"There is {list(detectors)}"
            )
    found: Dict[str, str] = {}
    for arm in arms_of(rows):
        row = next(row for row in rows if row.arm == arm)
        names = [named[arm]] if arm in named else [arm]
        if arm not in named and not _changes_network(row):
            stem = Path(row.config).stem
            names += [stem, stem.split("_mgd_")[0]]
        measured = [name for name in names if name in detectors]
        if measured:
            found[arm] = measured[0]
    return found


def latency_of_arms(
    rows: Sequence[Result], latency: Mapping[str, Latency], named: Mapping[str, str]
) -> Dict[str, Latency]:
    """Return the latency of each arm that has one (:func:`detectors_of_arms`).

    Raises:
        UserError: no arm has one.
    """
    found = detectors_of_arms(rows, latency, named)
    if not found:
        raise UserError(f"no arm of {arms_of(rows)}, nor its config, is among the detectors {list(latency)}")
    return {arm: latency[detector] for arm, detector in found.items()}


def _changes_network(row: Result) -> bool:
    """Return whether an override may change the network of a config, and so its latency."""
    harmless = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.BACKBONE.FREEZE_AT")
    keys = [key for key in overrides_of_text(row.overrides) if key.startswith("MODEL.") and key not in harmless]
    return any(not key.startswith("MODEL.MGD.") or key == "MODEL.MGD.STUDENT_BACKBONE" for key in keys)


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
