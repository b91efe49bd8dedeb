"""Pictures of a channel matching: how well it matches, and which channels it pairs.

Shape shorthand in this module: Cs student and Ct teacher channels of a position, groups of K teacher
channels, a map of H x W. Groups are as :func:`mgd_det.matching.assign_channels` gives them: (Cs, K)
long, -1 in the rows of student channels without a teacher channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
import torch

from mgd_det.matching import matched_cost
from mgd_det.matching.assignment import channel_owners, pair_costs
from mgd_det.visualization.figures import Output, color, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_RANDOM, _FORMER, _NEW = "#8C8C8C", color(1), color(0)
_SCALE_PERCENTILE = 99.5  # percentile of |value| at which the color scale of a row ends
_MOST_MEMBERS = 5  # teacher channels that are drawn of a group
_SIGNED_COLORS = "RdBu_r"  # red above zero, blue below, white at zero


@dataclass(frozen=True)
class MatchedPosition:
    """A position's matching, to be drawn or printed.

    Attributes:
        name: of the position.
        cost: (Cs, Ct) in [0, 4], as measured.
        groups: (Cs, K), the optimum for this cost.
        former: (Cs, K'), the groups of a checkpoint to compare with, or None.
    """

    name: str
    cost: torch.Tensor
    groups: torch.Tensor
    former: Optional[torch.Tensor] = None

    @property
    def random_cost(self) -> float:
        """Mean cost of a pair under a random assignment. All pairs are equally likely, so it is the mean of all."""
        return self.cost.mean().item()

    @property
    def optimal_cost(self) -> float:
        return matched_cost(self.cost, self.groups)

    @property
    def former_cost(self) -> Optional[float]:
        return None if self.former is None else matched_cost(self.cost, self.former)

    @property
    def left_out(self) -> int:
        """Number of teacher channels that no student channel has."""
        return self.cost.shape[1] - int((self.groups >= 0).sum())

    @property
    def moved(self) -> Optional[int]:
        """Number of teacher channels of the optimum that had another student channel, or none, in ``former``."""
        if self.former is None:
            return None
        mine, theirs = (channel_owners(groups, self.cost.shape[1]) for groups in (self.groups, self.former))
        return int(((mine >= 0) & (mine != theirs)).sum())


def plot_matching(
    positions: Sequence[MatchedPosition],
    output: Output,
    title: str = "Channel matching",
    former_name: str = "checkpoint's matching",
    groups_name: str = "optimum now",
) -> str:
    """Draw the costs of the matched pairs of each position, and what happens to the teacher's channels.

    One panel for each position shows how the costs are distributed over all pairs (that is, under a random
    assignment), over the pairs of the former matching, if any, and over those of the optimum, each with its mean. A
    bar below shows how many teacher channels are matched, have moved, or are left out.

    Args:
        positions: at least one.
        output: PNG to write, a path or a binary file.
        title: of the whole picture; "" for none.
        former_name: of the former matching, in the legend.
        groups_name: of the optimum, in the legend.

    Returns:
        The path of the picture.

    Raises:
        ValueError: ``positions`` is empty.
    """
    if not positions:
        raise ValueError("plot_matching needs at least one position")
    columns = min(len(positions), 4)
    rows = -(-len(positions) // columns)
    bars_height = 1.1 + 0.34 * len(positions)
    figure = new_figure(max(3.6 * columns, 7.2), 3.0 * rows + bars_height + 0.5)
    if title:
        figure.suptitle(title)
    above, below = figure.subfigures(2, 1, height_ratios=[3.0 * rows, bars_height], squeeze=False)[:, 0]
    panels = above.subplots(rows, columns, squeeze=False).flat
    for panel, position in zip(panels, positions):
        _plot_costs(panel, position, former_name, groups_name)
    for panel in list(panels)[len(positions) :]:
        panel.set_visible(False)
    above.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _plot_channel_bars(below, positions, former_name)
    return save_figure(figure, output)


def _plot_costs(axes: Axes, position: MatchedPosition, former_name: str, groups_name: str) -> None:
    # Under a random assignment all pairs are equally likely, so its costs have the distribution of all pairs.
    series = [("random pairs", _RANDOM, position.cost.flatten().numpy())]
    if position.former is not None:
        series.append((former_name, _FORMER, pair_costs(position.cost, position.former).numpy()))
    series.append((groups_name, _NEW, pair_costs(position.cost, position.groups).numpy()))
    bins = np.linspace(0, 4, 41)
    for order, (label, line_color, costs) in enumerate(series):
        mean = costs.mean()
        # Rounding may put a cost slightly outside [0, 4].
        shares = np.histogram(costs.clip(0, 4), bins)[0] / len(costs)
        axes.stairs(shares, bins, fill=True, color=line_color, alpha=0.25)
        axes.stairs(shares, bins, color=line_color, linewidth=1.5, label=label)
        axes.axvline(mean, color=line_color, linestyle="--", linewidth=1.2)
        # One line of text for each series, so that similar means stay readable.
        style: Dict[str, Any] = {"color": line_color, "ha": "right", "va": "top", "fontsize": 9, "fontweight": "bold"}
        axes.text(0.98, 0.96 - 0.085 * order, f"mean {mean:.3f}", transform=axes.transAxes, **style)
    students, teachers = position.cost.shape
    axes.set_title(f"{position.name}: {students} student, {teachers} teacher channels", fontsize=10)
    axes.set_xlabel("cost of a pair (0 alike, 2 unrelated)")
    axes.set_ylabel("share of the pairs")
    axes.set_xlim(0, 4)
    axes.set_ylim(0, 1.3 * axes.dataLim.y1)  # room for the means
    axes.spines[["top", "right"]].set_visible(False)


def _plot_channel_bars(figure: SubFigure, positions: Sequence[MatchedPosition], former_name: str) -> None:
    axes = figure.subplots()
    total, left_out, moved = np.array([(p.cost.shape[1], p.left_out, p.moved or 0) for p in positions]).T
    has_former = any(p.former is not None for p in positions)
    parts = [
        (f"as in the {former_name}" if has_former else "matched", _NEW, 1.0, "white"),
        ("moved" if has_former else "", _NEW, 0.4, "black"),
        ("left out", "#D9D9D9", 1.0, "black"),
    ]
    start = np.zeros(len(positions))
    for (name, face, alpha, text_color), numbers in zip(parts, (total - left_out - moved, moved, left_out)):
        shares = numbers / total
        style: Dict[str, Any] = {"color": face, "alpha": alpha, "edgecolor": "white", "label": name or None}
        bars = axes.barh(range(len(positions)), shares, left=start, height=0.7, **style)
        texts = [str(number) if share > 0.04 else "" for number, share in zip(numbers, shares)]
        axes.bar_label(bars, texts, label_type="center", color=text_color, fontsize=9)
        start = start + shares
    for row, p in enumerate(positions):
        groups = int((p.groups >= 0).any(dim=1).sum())
        unmatched = p.groups.shape[0] - groups
        note = f"{groups} groups of {p.groups.shape[1]}"
        note += f"\n{unmatched} student channels have none" if unmatched else ""
        axes.text(1.01, row, note, va="center", fontsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, fontsize=9)
    axes.set(yticks=range(len(positions)), yticklabels=[p.name for p in positions], xlim=(0, 1), xticks=[])
    axes.set_title("Teacher channels", fontsize=10)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def spread_channels(cost: torch.Tensor, groups: torch.Tensor, number: int) -> List[int]:
    """Return up to ``number`` matched student channels in even steps from the best matched to the worst."""
    matched = (groups[:, 0] >= 0).nonzero().squeeze(1)
    means = cost[matched].gather(1, groups[matched]).mean(dim=1)
    order = matched[means.argsort(stable=True)]
    picks = np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int)
    return [int(order[i]) for i in picks]


def plot_matched_channels(
    image: np.ndarray,
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: Mapping[str, torch.Tensor],
    groups: torch.Tensor,
    output: Output,
    *,
    channels: Sequence[int],
    cost: torch.Tensor,
    student_note: str = "",
    title: str = "Matched channels",
) -> str:
    """Draw one row for each of some student channels: image, its map, its teacher channels' maps, its targets.

    Red is above zero and blue below. The teacher's maps and the targets of a row share one color scale; the
    student's map has its own, since the cost compares the shapes of maps, not their scale. A color scale ends at the
    99.5th percentile of its absolute values.

    Args:
        image: (h, w, 3) uint8 RGB, as the networks see it, padding included.
        student: (Cs, H, W), such as the student's feature behind the norm layer of the loss.
        teacher: (Ct, H, W).
        targets: title -> (Cs, H, W), computed from the groups, such as their reduction ("AMP").
        groups: (Cs, K).
        output: PNG to write, a path or a binary file.
        channels: the student channels to draw, all of them matched.
        cost: (Cs, Ct), written above each teacher channel. The five cheapest of a group are drawn, the others counted.
        student_note: a line below the student channel's number, such as "after GN".
        title: of the whole picture.

    Returns:
        The path of the picture.

    Raises:
        ValueError: ``channels`` is empty, or has one without a teacher channel.
    """
    if not channels or any(groups[i, 0] < 0 for i in channels):
        raise ValueError(f"channels must be matched student channels, got {list(channels)}")
    members = min(groups.shape[1], _MOST_MEMBERS)
    hidden = groups.shape[1] - members
    columns = 2 + members + len(targets)
    figure = new_figure(1.5 * columns + 0.9, 1.62 * len(channels) + 0.8)
    figure.suptitle(title)
    grid = figure.subplots(len(channels), columns, squeeze=False)
    for row, channel in zip(grid, channels):
        group = groups[channel]
        group = group[cost[channel, group].argsort(stable=True)]
        names = [f"teacher {j}\ncost {cost[channel, j]:.2f}" for j in group.tolist()]
        if hidden:
            names[members - 1] += f" (+{hidden} more)"
        row[0].imshow(image)
        _show_maps(figure, row[1:2], student[channel : channel + 1], [f"student {channel}\n{student_note}"])
        _show_maps(
            figure,
            row[2:],
            torch.stack([*teacher[group[:members]], *(target[channel] for target in targets.values())]),
            [*names[:members], *targets],
        )
        for axes in row:
            axes.set(xticks=[], yticks=[])
    grid[0][0].set_title("image", fontsize=9)
    return save_figure(figure, output)


def _show_maps(figure: Figure, row: Sequence[Axes], maps: torch.Tensor, names: Sequence[str]) -> None:
    """Draw maps, (number of axes, H, W), in one color scale, with its color bar after the last."""
    from matplotlib.colors import CenteredNorm  # here: see mgd_det/visualization/figures.py
    from matplotlib.ticker import MaxNLocator

    values = maps.detach().float().cpu().numpy()
    limit = float(np.percentile(np.abs(values), _SCALE_PERCENTILE))
    norm = CenteredNorm(0, halfrange=limit if np.isfinite(limit) and limit > 0 else 1.0)
    for axes, one_map, name in zip(row, values, names):
        axes.imshow(one_map, cmap=_SIGNED_COLORS, norm=norm, interpolation="nearest")
        axes.set_title(name, fontsize=9)
    bar = figure.colorbar(row[-1].images[0], ax=list(row), fraction=0.05 if len(row) == 1 else 0.02, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.locator = MaxNLocator(4, symmetric=True)
    bar.update_ticks()
