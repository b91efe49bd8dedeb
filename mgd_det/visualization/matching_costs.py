"""The cost of the matching at each position over the updates of a training."""

from typing import Dict, Mapping

import numpy as np

from mgd_det.visualization.curves import Series
from mgd_det.visualization.figures import Output, new_figure, save_figure

_PREFIX = "mgd/cost_"


def matching_costs(metrics: Mapping[str, Series]) -> Dict[str, Series]:
    """Return the cost of each position over the updates, by its name; {} for a training without a matching.

    Args:
        metrics: as :func:`mgd_det.visualization.read_metrics` returns them.
    """
    return {name[len(_PREFIX) :]: metrics[name] for name in sorted(metrics) if name.startswith(_PREFIX)}


def plot_matching_costs(costs: Mapping[str, Series], output: Output) -> str:
    """Draw the cost of each position over the updates.

    Args:
        costs: as :func:`matching_costs` returns them, at least one.
        output: PNG to write, a path or a binary file.

    Returns:
        The path of the picture.
    """
    from matplotlib import colormaps  # here: see mgd_det/visualization/figures.py
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9.0, 3.6)
    axes = figure.subplots()
    for index, (name, (iterations, values)) in enumerate(costs.items()):
        line_color = colormaps["viridis"](0.9 * index / max(len(costs) - 1, 1))
        axes.step(iterations, values, where="post", color=line_color, marker="o", markersize=4, label=name)
    axes.set(xlabel="iteration of the update", ylabel="mean cost of a matched pair")
    axes.set_title("Cost of the matching (0 alike, 2 unrelated)", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, max(2.05, 1.05 * max(float(np.nanmax(values)) for _, values in costs.values())))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    return save_figure(figure, output)
