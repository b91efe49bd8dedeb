"""The picture of AP over the training, mean and standard error over seeds."""

import hashlib
from pathlib import Path
from typing import Dict, Sequence

from matplotlib.axes import Axes
from PIL import Image

from accuracy_study.results import Result
from accuracy_study.statistics import Mean, mean_over_seeds
from accuracy_study.tables import arms_of
from mgd_det.visualization.figures import color, new_figure

FINGERPRINT = "Description"  # the text entry of the PNG that holds the fingerprint of what it shows


def curve_of(rows: Sequence[Result]) -> Dict[int, Mean]:
    """Return the mean AP of an arm's rows by iteration, where all of them have one."""
    curves = [row.curve_points() for row in rows]
    iterations = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return {iteration: mean_over_seeds([curve[iteration] for curve in curves]) for iteration in iterations}


def fingerprint(rows: Sequence[Result]) -> str:
    """Return a hash of all that the picture shows."""
    shown = [
        (row.arm, row.seed, row.curve or row.AP, row.iterations, row.seconds, row.cpu_seconds, row.device)
        for row in rows
    ]
    return hashlib.sha256(repr(shown).encode("utf-8")).hexdigest()[:16]


def is_current(path: Path, wanted: str) -> bool:
    """Return whether a picture has this fingerprint."""
    if not path.exists():
        return False
    with Image.open(path) as picture:
        return picture.info.get(FINGERPRINT) == wanted


def draw_curves(rows: Sequence[Result], path: Path) -> None:
    """Draw AP over iterations, and over training time, for each arm of rows of one set.

    The lines are means over the seeds, and the bands around them one standard error to either side. An arm that is
    not trained (eval_only) is a horizontal line.
    """
    figure = new_figure(11, 4.6)
    by_iteration, by_time = figure.subplots(1, 2, sharey=True)
    on_cpu = all(row.device == "cpu" for row in rows)
    for index, arm in enumerate(arms_of(rows)):
        of_arm = [row for row in rows if row.arm == arm]
        if all(row.iterations == 0 for row in of_arm):
            for axes, label in ((by_iteration, arm), (by_time, None)):
                level = mean_over_seeds([row.AP for row in of_arm]).value
                axes.axhline(level, color=color(index), linestyle="-.", linewidth=1.5, label=label)
            continue
        curve = curve_of(of_arm)
        seconds = [(row.cpu_seconds_per_iteration if on_cpu else row.seconds_per_iteration) for row in of_arm]
        _draw(by_iteration, curve, 1.0, index, arm)
        _draw(by_time, curve, mean_over_seeds(seconds).value, index, arm)
    by_iteration.set(xlabel="iteration", ylabel="AP")
    by_time.set(xlabel=f"training time ({'CPU ' if on_cpu else ''}seconds)")
    by_iteration.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, format="png", metadata={FINGERPRINT: fingerprint(rows)})


def _draw(axes: Axes, curve: Dict[int, Mean], scale: float, index: int, name: str) -> None:
    style = ("-", "--", ":")[index // 7 % 3]  # colors repeat after seven
    x, means = [iteration * scale for iteration in curve], list(curve.values())
    axes.plot(
        x,
        [mean.value for mean in means],
        color=color(index),
        label=name,
        linestyle=style,
        marker="o",
        markersize=4,
        linewidth=1.8,
    )
    lower, upper = ([mean.value + sign * (mean.error or 0.0) for mean in means] for sign in (-1, 1))
    axes.fill_between(x, lower, upper, color=color(index), alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
