"""Curves of training runs, read from the metrics.json that Detectron2 writes to OUTPUT_DIR.

A *series* is the values of one metric: (iterations, values), two arrays of equal length, iterations ascending.
"""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Tuple

import numpy as np

from mgd_det.distillation import is_distillation_loss
from mgd_det.errors import UserError
from mgd_det.visualization.figures import Output, PathLike, color, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

Series = Tuple[np.ndarray, np.ndarray]

_LINE_STYLES = ("-", "--", ":", "-.")


def read_metrics(path: PathLike) -> Dict[str, Series]:
    """Read the series of every number in a metrics.json, by name.

    The half-written line of a killed run is skipped. A resumed run continues from its last checkpoint: entries of the
    killed run from that iteration on are dropped, so that every iteration counts once, as it was trained last.

    Raises:
        UserError: the file cannot be read, or has no entry of a training run.
    """
    by_iteration: Dict[int, Dict[str, float]] = {}
    last_loss = -1
    for row in _rows(os.fspath(path)):
        iteration = row["iteration"]
        if "total_loss" in row:
            # Detectron2 writes this entry periodically, in order; other metrics may come late.
            if iteration <= last_loss:
                by_iteration = {i: values for i, values in by_iteration.items() if i < iteration}
            last_loss = iteration
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "iteration"}
        by_iteration.setdefault(iteration, {}).update(numbers)
    if not by_iteration:
        raise UserError(f"{os.fspath(path)} has no entry of a training run: is it Detectron2's metrics.json?")
    return {name: _series(by_iteration, name) for name in {n: 0 for row in by_iteration.values() for n in row}}


def _series(by_iteration: Mapping[int, Mapping[str, float]], name: str) -> Series:
    iterations = [i for i in sorted(by_iteration) if name in by_iteration[i]]
    return np.array(iterations, dtype=np.int64), np.array([by_iteration[i][name] for i in iterations])


def detection_loss(metrics: Mapping[str, Series]) -> Series:
    """Return the sum of the detector's own losses, so that runs with and without distillation can be compared.

    It is not the total minus the distillation losses: metrics.json has medians, whose difference can be negative.
    """
    sums: Dict[int, float] = {}
    for name, (iterations, losses) in metrics.items():
        if name.startswith("loss_") and not is_distillation_loss(name):
            for iteration, loss in zip(iterations.tolist(), losses.tolist()):
                sums[iteration] = sums.get(iteration, 0.0) + loss
    return _series({iteration: {"loss": loss} for iteration, loss in sums.items()}, "loss")


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the median of ``window`` values around each (odd; fewer at the ends), which ignores single spikes."""
    medians = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)  # symmetric, so that a slope keeps its ends
        near = values[i - reach : i + reach + 1]
        medians.append(np.median(near[np.isfinite(near)]) if np.isfinite(near).any() else np.nan)
    return np.array(medians)


def plot_curves(runs: Mapping[str, PathLike], output: Output, metric: str = "bbox/AP", title: str = "Training") -> str:
    """Draw loss and AP of several training runs.

    The panels are the detection loss, the distillation losses of each position, and ``metric``. A panel for which no
    run has an entry is left out.

    Args:
        runs: name of each run (for the legend) -> its metrics.json.
        output: PNG to write, a path or a binary file.
        metric: what is drawn over the iterations in which it was evaluated.
        title: of the whole picture; "" for none.

    Returns:
        The path of the picture.

    Raises:
        UserError: a file is missing, or is not a metrics.json.
        ValueError: ``runs`` is empty.
    """
    if not runs:
        raise ValueError("plot_curves needs at least one run")
    metrics = {name: read_metrics(path) for name, path in runs.items()}
    losses = sorted({name for of_run in metrics.values() for name in of_run if is_distillation_loss(name)})
    evaluated = any(np.isfinite(of_run[metric][1]).any() for of_run in metrics.values() if metric in of_run)
    number = 1 + bool(losses) + evaluated
    figure = new_figure(5.4 * number, 4.4)
    if title:
        figure.suptitle(title)
    panels = iter(figure.subplots(1, number, squeeze=False)[0])
    _plot_detection_loss(next(panels), metrics)
    if losses:
        _plot_distillation_losses(next(panels), metrics, losses)
    if evaluated:
        _plot_metric(next(panels), metrics, metric)
    return save_figure(figure, output)


def _plot_detection_loss(axes: Axes, metrics: Mapping[str, Mapping[str, Series]]) -> None:
    series = {name: detection_loss(of_run) for name, of_run in metrics.items()}
    for index, (name, of_run) in enumerate(series.items()):
        _plot_smoothed(axes, of_run, color=color(index), label=name)
    _finish(axes, "Detection loss (without distillation)", "loss", from_zero=True)
    for index, (iterations, values) in enumerate(series.values()):
        axes.plot(iterations, values, color=color(index), alpha=0.2, linewidth=1)


def _plot_distillation_losses(axes: Axes, metrics: Mapping[str, Mapping[str, Series]], losses: List[str]) -> None:
    from matplotlib import colormaps  # here: see mgd_det/visualization/figures.py

    distilled = [name for name, of_run in metrics.items() if any(loss in of_run for loss in losses)]
    for style, name in enumerate(distilled):
        for index, loss in enumerate(losses):
            if loss in metrics[name]:
                # The default loss, loss_mgd_<position>, is labelled by its position alone.
                short = loss.replace("loss_mgd_", "", 1).replace("loss_", "", 1)
                _plot_smoothed(
                    axes,
                    metrics[name][loss],
                    # From shallow to deep, in other colors than those of the runs in the other panels.
                    color=colormaps["viridis"](0.9 * index / max(len(losses) - 1, 1)),
                    linestyle=_LINE_STYLES[style % len(_LINE_STYLES)],
                    label=short if len(distilled) == 1 else f"{short}, {name}",
                )
    title = "Distillation losses" + (f" of {distilled[0]}" if len(distilled) == 1 else "")
    _finish(axes, title, "loss, weighted", from_zero=True)


def _plot_metric(axes: Axes, metrics: Mapping[str, Mapping[str, Series]], metric: str) -> None:
    ends = []
    for index, (name, of_run) in enumerate(metrics.items()):
        iterations, values = of_run.get(metric, (np.array([]), np.array([])))
        finite = np.isfinite(values)
        if finite.any():
            axes.plot(iterations[finite], values[finite], color=color(index), marker="o", linewidth=2, label=name)
            ends.append((values[finite][-1], iterations[finite][-1], color(index)))
    axes.margins(x=0.14, y=0.1)
    _finish(axes, f"{metric} on the validation set", "AP in %" if metric.endswith("AP") else metric)
    low, high = axes.get_ylim()
    height = low
    for value, iteration, run_color in sorted(ends):  # moved apart where two would overlap
        height = max(value, height + 0.05 * (high - low))
        style: Dict[str, Any] = {"color": run_color, "fontweight": "bold", "va": "center"}
        axes.annotate(f"{value:.1f}", (iteration, height), xytext=(7, 0), textcoords="offset points", **style)


def _plot_smoothed(axes: Axes, series: Series, **style: Any) -> None:
    iterations, values = series
    # Detectron2's values are medians of 20 iterations: a short run needs no more.
    line = smooth(values, 1 if len(values) < 20 else 2 * (len(values) // 40) + 3)
    marker = "." if np.isfinite(line).sum() < 5 else ""  # a single point would be an invisible line
    axes.plot(iterations, line, linewidth=2, marker=marker, **style)


def _finish(axes: Axes, title: str, ylabel: str, from_zero: bool = False) -> None:
    axes.set_title(title, fontsize=11)
    axes.set(xlabel="iteration", ylabel=ylabel)
    if from_zero:  # fixes the upper limit too: what is drawn later, such as a spike, does not change it
        axes.set_ylim(bottom=min(0.0, axes.dataLim.y0))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    names = axes.get_legend_handles_labels()[1]
    if names:
        axes.legend(frameon=False, fontsize=9 if len(names) < 6 else 8)


def _rows(path: str) -> Iterator[Dict[str, Any]]:
    """Yield the entries of a metrics.json that have an iteration, in the order in which they were written."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = f.read().splitlines()
    except OSError as e:
        raise UserError(f"metrics {path} cannot be read: {e.strerror or e}") from e
    for number, line in enumerate(lines, start=1):
        # A resumed run writes on in the line that a killed one left half-written; entries are flat.
        start = line.rfind("{")
        try:
            row = json.loads(line[max(start, 0) :]) if line.strip() else None
        except ValueError:
            row, start = None, -1
        if start != 0 and line.strip():
            logger.warning(f"{path}, line {number}: skipped an incomplete entry")
        if isinstance(row, dict) and isinstance(row.get("iteration"), int):
            yield row
