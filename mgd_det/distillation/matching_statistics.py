"""One update of the matching: measure the costs on some batches, solve, put the result in force."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Union

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from mgd_det.distillation.conv_bn_fusion import BATCH_NORMS
from mgd_det.distillation.distiller import Distiller
from mgd_det.distillation.losses import marginal_relu
from mgd_det.distillation.margins import MeasuredMargin, negative_margin
from mgd_det.distillation.padding import Padding
from mgd_det.distillation.positions import Position
from mgd_det.errors import ArgumentError, UserError, check_choice
from mgd_det.matching import ChannelCost, assign_channels, matched_cost
from mgd_det.matching.assignment import channel_owners

MARGIN_SOURCES = ("auto", "norm", "measured")


@dataclass(frozen=True)
class MatchingReport:
    """What an update did at one position.

    Attributes:
        cost_before: mean cost of a matched pair, in [0, 4], of the former groups on the new costs; None at the first.
        cost_after: the same of the new groups.
        moved: teacher channels that changed their student channel; None at the first.
        mean_square: of the target behind its margin, see :meth:`Distiller.mean_square`.
    """

    position: Position
    group_size: int
    cost_before: Optional[float]
    cost_after: float
    moved: Optional[int]
    mean_square: float


class MatchingStatistics:
    """Measures what a matching is solved from. One object serves one update.

    The mean square of the target is measured with a position's first matching and in the first window of training's own
    features, and stays from then on: a scale that moved with the groups would change the position's weight at every
    update. The target depends on the groups. Those in force are used; if there are none yet, those that the first batch
    alone gives. The groups that this update solves may differ.

    Attributes:
        last_student, last_teacher: the features of the last batch, by name.
    """

    def __init__(
        self,
        distiller: Distiller,
        norms: Dict[str, Optional[nn.Module]],
        margin: str = "auto",
        *,
        of_training: bool = False,
        first_window: bool = False,
    ) -> None:
        """
        Args:
            distiller: the owner of the positions, which gets the new matching.
            norms: by position name, the teacher's last norm layer before the feature, or None.
            margin: source of the margins, of :data:`MARGIN_SOURCES`.
            of_training: the features are those of training's own steps. A batch with a value that is not finite is
                left out, because training may skip its step, and the last features are not kept, to save memory.
                Such a measurement can only update a matching: the first one needs the last features.
            first_window: measure the mean square of the target though there is a matching, which one batch gave.
        """
        self._distiller = distiller
        self._of_training = of_training
        self._positions = distiller.matched_positions
        self._costs = {p.name: ChannelCost(p.matched_channels, p.teacher_channels) for p in self._positions}
        self._norm_margins = {p.name: norm_margin(norms[p.name], p, margin) for p in self._positions}
        self._measured_margins = {
            p.name: MeasuredMargin(p.teacher_channels) for p in self._positions if self._norm_margins[p.name] is None
        }
        self._squares = {p.name: _Squares() for p in self._positions}
        self._is_scaled = {p.name: first_window or not distiller.has_matching(p) for p in self._positions}
        self._provisional: Dict[str, torch.Tensor] = {}  # groups by which the scale of a first matching is measured
        self._last_padding: Optional[Padding] = None
        for part in self._parts:
            # A rank that sees no image takes part in the all-reduce too.
            part.sums = part.sums.to(next(distiller.buffers()).device)
        self.last_student: Dict[str, torch.Tensor] = {}
        self.last_teacher: Dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(
        self,
        student: Dict[str, torch.Tensor],
        teacher: Dict[str, torch.Tensor],
        padding: Optional[Padding] = None,
    ) -> None:
        """Add the features of a batch. Nothing is read back from the device, except by the second of a first matching.

        Args:
            student: by name, (B, Cs, H, W).
            teacher: by name, (B, Ct, H, W).
            padding: of the images; None if the images cover the whole maps. Margins and mean squares leave it out.
        """
        self._distiller.require_inherited_channels()
        if self.last_teacher:
            self._solve_provisionally()
        for p in self._positions:
            s, t = self._distiller.adapted(p, student[p.student]), teacher[p.teacher]
            self._costs[p.name].update(s, t, only_finite=self._of_training)
            if p.name in self._measured_margins:
                self._measured_margins[p.name].update(t, padding, only_finite=self._of_training)
            if self._is_scaled[p.name]:
                if self._distiller.has_matching(p):
                    self._add_squares(p, t, padding, self._distiller.groups(p), self._distiller.margin(p))
                elif p.name in self._provisional:
                    self._add_squares(p, t, padding, self._provisional[p.name], self._margin(p))
        if not self._of_training:
            self.last_student, self.last_teacher, self._last_padding = student, teacher, padding

    def _solve_provisionally(self) -> None:
        """Solve the groups of first matchings from the batches so far, and add the last batch's squares by them."""
        for p in self._positions:
            if not self._is_scaled[p.name] or self._distiller.has_matching(p) or p.name in self._provisional:
                continue
            try:
                groups = self._distiller.groups(p)
                if p.matching == "assignment":
                    groups = assign_channels(self.cost(p), self._distiller.group_size(p))
            except ValueError:  # not finite: the same error ends the update
                continue
            self._provisional[p.name] = groups.to(self._distiller.margin(p).device)
            self._add_squares(
                p, self.last_teacher[p.teacher], self._last_padding, self._provisional[p.name], self._margin(p)
            )

    def _add_squares(
        self, p: Position, teacher: torch.Tensor, padding: Optional[Padding], groups: torch.Tensor, margin: torch.Tensor
    ) -> None:
        squares = self._squares[p.name]
        squares.sums = squares.sums.to(teacher.device)
        squares.sums += self._squares_of(teacher, padding, groups, margin)

    def _squares_of(
        self, teacher: torch.Tensor, padding: Optional[Padding], groups: torch.Tensor, margin: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of the target's squares and the number of its values, (2,) float64."""
        matched = groups.to(teacher.device)
        if len(groups) > teacher.shape[1]:
            # Exactly as many rows have a group as the teacher has channels; sorting finds them without reading a number
            # from the device.
            matched = matched[matched[:, 0].argsort(descending=True)[: teacher.shape[1]]]
        margin = margin.to(teacher.device)
        total = torch.zeros(2, dtype=torch.float64, device=teacher.device)
        # Image by image, so that no whole map is copied.
        for image in teacher if padding is None else padding.covered(teacher):
            target, m = self._distiller.reduce(image.unsqueeze(0), margin, matched)
            total[0] += marginal_relu(target.float(), m).square().sum(dtype=torch.float64)
            total[1] += target.numel()
        return torch.where(total.isfinite().all(), total, 0.0) if self._of_training else total

    def cost(self, position: Position) -> torch.Tensor:
        """Return the mean cost, (Cs, Ct) float64 on the CPU: of this rank's images; after :meth:`solve`, of all."""
        return self._costs[position.name].mean()

    @property
    def num_images(self) -> int:
        """Number of images measured; after :meth:`solve`, by all ranks together."""
        return next(iter(self._costs.values())).num_images

    # ------------------------------------------------------------------ what was added so far
    @property
    def _parts(self) -> List[Union[ChannelCost, MeasuredMargin, "_Squares"]]:
        return [*self._costs.values(), *self._measured_margins.values(), *self._squares.values()]

    @property
    def sums(self) -> torch.Tensor:
        """All that was measured, (n,) float64. Add the sums of two measurements to get those of both."""
        return torch.cat([part.sums.flatten() for part in self._parts])

    def load_sums(self, sums: torch.Tensor) -> None:
        """Replace the measurement by the :attr:`sums` of this or another rank.

        Raises:
            UserError: they are of other positions.
        """
        numbers = [part.sums.numel() for part in self._parts]
        squares = sum(part.sums.numel() for part in self._squares.values())
        if sums.numel() == sum(numbers) - squares:
            # A checkpoint of an earlier version has none: the scale then comes from the batches after it.
            sums = torch.cat([sums, sums.new_zeros(squares)])
        if sums.numel() != sum(numbers):
            raise UserError(
                "the checkpoint's measurement of the matching is of other positions, nets or margins "
                f"({sums.numel()} sums, not {sum(numbers)}): resume with the config of the checkpoint"
            )
        for part, own in zip(self._parts, sums.split(numbers)):
            part.sums = own.view(part.sums.shape).to(part.sums)

    def all_reduced_sums(self) -> torch.Tensor:
        """Return :attr:`sums` of all ranks together. Collective."""
        sums = self.sums
        if comm.get_world_size() > 1:
            dist.all_reduce(sums)
        return sums

    # ------------------------------------------------------------------ the update
    def solve(self) -> List[MatchingReport]:
        """Add up the ranks' sums, solve every position, and put the result in force. Collective.

        Rank 0 assigns and broadcasts, so that every rank has the same groups even if costs tie.

        Raises:
            FloatingPointError: the features were not finite; on every rank.
        """
        if self._positions:
            self.load_sums(self.all_reduced_sums())
        return [self._solve(p) for p in self._positions]

    def _solve(self, p: Position) -> MatchingReport:
        try:
            matrix = self.cost(p)
        except ValueError as e:  # all ranks have the same sums, and so this error
            raise FloatingPointError(f"matching at {p.name}: {e}") from e
        groups = self._assigned(p, matrix)
        cost_before, moved = None, None
        if self._distiller.has_matching(p):
            former = self._distiller.groups(p).cpu()
            cost_before = matched_cost(matrix, former)
            owners = [channel_owners(g, p.teacher_channels) for g in (former, groups)]
            moved = int((owners[0] != owners[1]).sum())
        margin, mean_square = self._margin(p), self._distiller.mean_square(p)
        if self._is_scaled[p.name]:
            mean_square = self._mean_square(p, groups, margin)
        self._distiller.set_matching(p, groups=groups, margin=margin, mean_square=mean_square)
        mean_square = self._distiller.mean_square(p)
        return MatchingReport(
            p, groups.shape[1], cost_before, matched_cost(matrix, groups), moved, mean_square=mean_square.item()
        )

    def _margin(self, p: Position) -> torch.Tensor:
        """Return the margins (Ct,) by the norm layer, or as measured so far."""
        margin = self._norm_margins[p.name]
        return self._measured_margins[p.name].mean() if margin is None else margin

    def _assigned(self, p: Position, matrix: torch.Tensor) -> torch.Tensor:
        """Return the groups (Cs, group size), solved by rank 0: all ranks at once would slow each other. Collective."""
        if p.matching != "assignment":
            return self._distiller.groups(p).cpu()
        shape = self._distiller.groups(p).shape
        groups, problem = torch.full(shape, -1), ""
        if comm.is_main_process():
            try:
                groups = assign_channels(matrix, self._distiller.group_size(p))
            except ValueError as e:
                problem = str(e)
        if comm.get_world_size() > 1:
            outcome: List[Any] = [groups, problem]
            dist.broadcast_object_list(outcome, src=0, device=self._distiller.margin(p).device)
            groups, problem = outcome
        if problem:
            raise FloatingPointError(f"matching at {p.name}: {problem}")
        return groups

    def _mean_square(self, p: Position, groups: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
        """Return the mean square of the target over all ranks. Collective."""
        squares = self._squares[p.name].sums
        if not self._of_training:
            # A rank that saw one batch has solved no groups by itself: it uses the new ones.
            late = torch.zeros_like(squares)
            if self.last_teacher and p.name not in self._provisional and not self._distiller.has_matching(p):
                late += self._squares_of(self.last_teacher[p.teacher], self._last_padding, groups, margin)
            if comm.get_world_size() > 1:
                dist.all_reduce(late)
            squares = squares + late
        total, number = squares
        return torch.where(number > 0, total / number.clamp(min=1), self._distiller.mean_square(p))


class _Squares:
    """Sum of the squares of a target's values, and their number.

    Attributes:
        sums: (2,) float64. Add the sums of several ranks or runs to get those over all their images.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)


def norm_margin(norm: Optional[nn.Module], position: Position, source: str) -> Optional[torch.Tensor]:
    """Return the margins (Ct,) by the teacher's norm layer, or None if they must be measured.

    Args:
        norm: the teacher's last norm layer before the position's feature, or None.
        source: of :data:`MARGIN_SOURCES`.

    "auto" takes them from a batch norm only, whose weight and bias are the deviation and the mean of each channel.

    Raises:
        ArgumentError: the source is unknown, or is "norm" where the norm layer cannot give a margin.
    """
    check_choice("margin", source, MARGIN_SOURCES)
    if source == "measured":
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None or bias is None or weight.shape != (position.teacher_channels,):
        problem = "has no norm layer with a weight and a bias for each channel"
    elif _has_initial_statistics(norm):
        problem = (
            "has its norm's statistics folded into weight and bias (mean 0, variance 1), as Detectron1's weights do"
        )
    elif source == "auto" and not isinstance(norm, BATCH_NORMS):
        return None  # a group norm's weight and bias describe a channel only roughly: its mean is not its bias
    else:
        return negative_margin(weight, bias).cpu()
    if source == "norm":
        raise ArgumentError(
            "margin", f"is 'norm', but the teacher's {position.teacher!r} {problem}: use 'auto' or 'measured'"
        )
    return None


def _has_initial_statistics(norm: Optional[nn.Module]) -> bool:
    """Return whether a batch norm's running statistics are the initial ones, which say nothing of its input."""
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or var is None:
        return False
    return bool((mean == 0).all() and ((var - 1).abs() < 1e-4).all())
