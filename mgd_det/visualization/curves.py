"""Curves of training runs, read from the metrics.json that Detectron2 writes to OUTPUT_DIR.

A *series* is the values of one metric: (iterations, values), two arrays of equal length, iterations ascending.
"""

import json
import logging
import os
from typing import Any, Dict, Iterator, List, Mapping, Tuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from mgd_det.distillation import is_distillation_loss
from mgd_det.errors import UserError
from mgd_det.visualization.figures import PathLike, color, new_figure, save_figure

logger = logging.getLogger(__name__)

Series = Tuple[np.ndarray, np.ndarray]

_LINE_STYLES = ("-", "--", ":", "-.")


def read_metrics(path: PathLike) -> Dict[str, Series]:
    """The series of every number in a metrics.json, by name.

    A run that was killed may have left half a line, which is skipped. A resumed run starts again at its
    last checkpoint: what the killed one had written from that iteration on is dropped, so that every
    iteration counts once, as it was trained last.

    Raises:
        UserError: there is no such file, or it has no entry of a training run.
    """
    by_iteration: Dict[int, Dict[str, float]] = {}
    last_loss = -1
    for row in _rows(os.fspath(path)):
        iteration = row["iteration"]
        if "total_loss" in row:
            # Detectron2 writes this entry once a period, in order; other metrics may come late.
            if iteration <= last_loss:
                for repeated in [i for i in by_iteration if i >= iteration]:
                    del by_iteration[repeated]
            last_loss = iteration
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "iteration"}
        by_iteration.setdefault(iteration, {}).update(numbers)
    if not by_iteration:
        raise UserError(f"{os.fspath(path)} has no entry of a training run: is it Detectron2's metrics.json?")
    points: Dict[str, List[Tuple[int, float]]] = {}
    for iteration in sorted(by_iteration):
        for name, value in by_iteration[iteration].items():
            points.setdefault(name, []).append((iteration, value))
    return {
        name: (np.array([i for i, _ in pairs], dtype=np.int64), np.array([v for _, v in pairs]))
        for name, pairs in points.items()
    }


def detection_loss(metrics: Mapping[str, Series]) -> Series:
    """The sum of the detector's own losses, without distillation, so that runs with and without it compare.

    Not the total less the distillation losses: metrics.json has medians, of which that difference can be negative.
    """
    sums: Dict[int, float] = {}
    for name, (iterations, losses) in metrics.items():
        if name.startswith("loss_") and not is_distillation_loss(name):
            for iteration, loss in zip(iterations.tolist(), losses.tolist()):
                sums[iteration] = sums.get(iteration, 0.0) + loss
    at = sorted(sums)
    return np.array(at, dtype=np.int64), np.array([sums[iteration] for iteration in at])


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Median over ``window`` values around each (odd, >= 1; fewer at the ends), which a single spike cannot move."""
    half = window // 2
    finite = np.where(np.isfinite(values), values, np.nan)
    out = np.full(len(values), np.nan)
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # symmetric, so that a slope is not bent at the ends
        near = finite[i - reach : i + reach + 1]
        if not np.isnan(near).all():
            out[i] = np.nanmedian(near)
    return out


def plot_curves(
    runs: Mapping[str, PathLike], output: PathLike, metric: str = "bbox/AP", title: str = "Training"
) -> str:
    """Draws loss and AP of several training runs side by side.

    One panel has the detection loss, one the distillation losses of each position and one ``metric``; a
    panel for which no run has an entry is left out.

    Args:
        runs: name of each run (for the legend) -> its metrics.json.
        output: PNG to write.
        metric: what is drawn over the iterations where it was evaluated.
        title: of the whole picture.

    Returns:
        The path of the picture.

    Raises:
        UserError: a file is not there or is no metrics.json.
    """
    if not runs:
        raise ValueError("plot_curves needs at least one run")
    metrics = {name: read_metrics(path) for name, path in runs.items()}
    losses = _distillation_losses(metrics)
    with_metric = any(_finite(m.get(metric)) for m in metrics.values())
    panels = 1 + bool(losses) + with_metric
    figure = new_figure(5.4 * panels, 4.4)
    figure.suptitle(title)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    _plot_detection_loss(axes.pop(0), metrics)
    if losses:
        _plot_distillation_losses(axes.pop(0), metrics, losses)
    if with_metric:
        _plot_metric(axes.pop(0), metrics, metric)
    return save_figure(figure, output)


def _plot_detection_loss(axes: Axes, metrics: Mapping[str, Dict[str, Series]]) -> None:
    shown = []
    for index, (name, of_run) in enumerate(metrics.items()):
        iterations, values = detection_loss(of_run)
        line = smooth(values, _window(len(values)))
        axes.plot(iterations, values, color=color(index), alpha=0.2, linewidth=1)
        axes.plot(iterations, line, color=color(index), linewidth=2, marker=_marker(line), label=name)
        shown.append(line)
    _finish(axes, "Detection loss (without distillation)", "loss")
    _limit(axes, np.concatenate(shown))


def _plot_distillation_losses(axes: Axes, metrics: Mapping[str, Dict[str, Series]], losses: List[str]) -> None:
    distilled = [name for name, of_run in metrics.items() if any(loss in of_run for loss in losses)]
    shown = []
    for style, name in enumerate(distilled):
        for index, loss in enumerate(losses):
            if loss not in metrics[name]:
                continue
            iterations, values = metrics[name][loss]
            line = smooth(values, _window(len(values)))
            # The default loss, loss_mgd_<position>, goes by its position alone.
            short = loss.replace("loss_mgd_", "", 1).replace("loss_", "", 1)
            label = short if len(distilled) == 1 else f"{short}, {name}"
            axes.plot(
                iterations,
                line,
                # From shallow to deep, in other colours than the runs have in the other panels.
                color=colormaps["viridis"](0.9 * index / max(len(losses) - 1, 1)),
                linestyle=_LINE_STYLES[style % len(_LINE_STYLES)],
                linewidth=2,
                marker=_marker(line),
                label=label,
            )
            shown.append(line)
    title = "Distillation losses" + (f" of {distilled[0]}" if len(distilled) == 1 else "")
    _finish(axes, title, "loss, weighted", small_legend=len(distilled) > 1)
    _limit(axes, np.concatenate(shown))


def _plot_metric(axes: Axes, metrics: Mapping[str, Dict[str, Series]], metric: str) -> None:
    finals = []
    for index, (name, of_run) in enumerate(metrics.items()):
        if not _finite(of_run.get(metric)):
            continue
        iterations, values = of_run[metric]
        finite = np.isfinite(values)
        iterations, values = iterations[finite], values[finite]
        axes.plot(iterations, values, color=color(index), marker="o", linewidth=2, label=name)
        finals.append((iterations[-1], values[-1], index))
    axes.margins(x=0.14, y=0.1)
    _finish(axes, f"{metric} on the validation set", "AP in %" if metric.endswith("AP") else metric)
    _label_ends(axes, finals)


def _label_ends(axes: Axes, ends: List[Tuple[int, float, int]]) -> None:
    """Writes each run's last value beside its last point, moved apart where two would overlap."""
    low, high = axes.get_ylim()
    apart = 0.05 * (high - low)
    heights: List[float] = []
    for iteration, value, index in sorted(ends, key=lambda end: end[1]):
        height = max([value, *(h + apart for h in heights[-1:])])
        heights.append(height)
        axes.annotate(
            f"{value:.1f}",
            (iteration, height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color(index),
            fontweight="bold",
        )


def _finish(axes: Axes, title: str, ylabel: str, small_legend: bool = False) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("iteration")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8 if small_legend else 9)


def _limit(axes: Axes, shown: np.ndarray) -> None:
    """From zero to just above the smoothed lines: a spike of the raw values must not flatten them."""
    shown = shown[np.isfinite(shown)]
    if shown.size and shown.max() > 0:
        axes.set_ylim(min(0.0, shown.min()), 1.08 * shown.max())


def _window(length: int) -> int:
    # Detectron2's values are medians over 20 iterations already: a short run needs no more.
    return 1 if length < 20 else 2 * (length // 40) + 3


def _marker(values: np.ndarray) -> str:
    return "." if np.isfinite(values).sum() < 5 else ""  # a single point would be an invisible line


def _finite(series: Any) -> bool:
    return series is not None and bool(np.isfinite(series[1]).any())


def _distillation_losses(metrics: Mapping[str, Mapping[str, Series]]) -> List[str]:
    return sorted({name for of_run in metrics.values() for name in of_run if is_distillation_loss(name)})


def _rows(path: str) -> Iterator[Dict[str, Any]]:
    """The entries of a metrics.json with an iteration, in the order they were written."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = f.read().splitlines()
    except OSError as e:
        raise UserError(f"metrics {path} cannot be read: {e.strerror or e}") from e
    for number, line in enumerate(lines, start=1):
        # A resumed run goes on in the line that a killed one left half written; entries are flat.
        start = line.rfind("{")
        if start != 0 and line.strip():
            logger.warning(f"{path}, line {number}: skipped what a killed run left unfinished")
        try:
            row = json.loads(line[start:]) if start >= 0 else None
        except ValueError:
            logger.warning(f"{path}, line {number}: skipped, it is no whole entry")
            continue
        if isinstance(row, dict) and isinstance(row.get("iteration"), int):
            yield row
