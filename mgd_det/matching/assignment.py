"""The optimal assignment of teacher channels to student channels."""

from typing import Optional

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


def assign_channels(cost: torch.Tensor, group_size: Optional[int] = None) -> torch.Tensor:
    """Gives every student channel its group of teacher channels, at the least total cost.

    Solves MGD's equation 4 exactly: a binary M (Cs, Ct) minimising sum(M * cost), where each student
    channel gets exactly ``group_size`` distinct teacher channels and a teacher channel serves at
    most one student channel. The costliest teacher channels are left out where Ct is no multiple of Cs.

    Args:
        cost: (Cs, Ct), finite, in any unit.
        group_size: teacher channels in a group, 1 <= group_size <= Ct / Cs. Default: as many as
            there can be, floor(Ct / Cs). Where Cs > Ct it is 1: each teacher channel goes to one
            student channel, and the student channels left without one get -1.

    Returns:
        groups, (Cs, group_size) long on the CPU: row i holds the teacher channels of student
        channel i in ascending order.

    Raises:
        ValueError: the cost is not a finite matrix, or the group size cannot be had.
    """
    if cost.dim() != 2 or 0 in cost.shape:
        raise ValueError(f"the cost must be a matrix (Cs, Ct) of at least one channel each, got {tuple(cost.shape)}")
    matrix = cost.detach().cpu().double().numpy()
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(
            f"the cost of student channel {row} and teacher channel {column} is {matrix[row, column]}: "
            "the features it was measured on are not finite"
        )
    num_student, num_teacher = matrix.shape
    largest = max(num_teacher // num_student, 1)
    if group_size is None:
        group_size = largest
    if not 1 <= group_size <= largest:
        raise ValueError(
            f"group_size is {group_size}, but {num_teacher} teacher channels give each of "
            f"{num_student} student channels 1 to {largest}"
        )
    if num_student > num_teacher:
        groups = np.full((num_student, 1), -1, dtype=np.int64)
        students = _cheapest_columns(np.ascontiguousarray(matrix.T), 1)[:, 0]
        groups[students, 0] = np.arange(num_teacher)
    else:
        groups = _cheapest_columns(matrix, group_size)
    return torch.from_numpy(np.sort(groups, axis=1))


def _cheapest_columns(cost: np.ndarray, size: int) -> np.ndarray:
    """(rows, size): distinct columns for every row, at the least total cost; size * rows <= columns.

    Each row stands for ``size`` equal rows of a linear assignment. scipy's solver is exact, and slow where most
    columns are taken and the costs are those of features (three seconds at 2048 channels): it starts from nothing.
    There, it is given the costs less a potential of each column, which some rounds of Sinkhorn's algorithm find.
    In a square problem that leaves every optimum an optimum, whatever the potentials, and most rows find their
    column at once. Another row, of equal costs, takes the columns left over, which makes the problem square.
    """
    rows, columns = cost.shape
    left_over = columns - rows * size
    copies = np.full(rows, size)
    # With more left over, equal rows that compete cost more than the potentials save. Costs of beyond 1e154 have no
    # standard deviation.
    if left_over <= columns // 5 and np.isfinite(cost.std()):
        if left_over > 0:
            cost = np.concatenate([cost, np.full((1, columns), cost.mean())])
            copies = np.append(copies, left_over)
        cost = cost - _potentials(cost, copies)
    slots, taken = linear_sum_assignment(np.repeat(cost, copies, axis=0))
    return taken[np.argsort(slots)][: rows * size].reshape(rows, size)


def _potentials(cost: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """(columns,): nearly the dual variables of the columns (Cuturi, "Sinkhorn Distances", NeurIPS 2013).

    Args:
        cost: (rows, columns).
        copies: (rows,), columns that each row takes; their sum is the number of columns.
    """
    potentials, copies = np.zeros(cost.shape[1]), copies.astype(np.float32)
    for temperature in (0.1, 0.03, 0.01, 0.003, 0.001):
        scale = temperature * cost.std()
        if scale == 0:
            break
        reduced = cost - potentials
        reduced -= reduced.min(axis=1, keepdims=True)
        # Bounded, so that no sum is zero or infinite. What float32 rounds costs time at most, as any potentials do.
        kernel = np.exp(np.maximum(reduced / -scale, -30).astype(np.float32))
        column_scales = np.ones(cost.shape[1], np.float32)
        for _ in range(80):
            row_scales = copies / (kernel @ column_scales)
            column_scales = 1 / (row_scales @ kernel)
        potentials = potentials + scale * np.log(column_scales.astype(np.float64))
    return potentials


def matched_cost(cost: torch.Tensor, groups: torch.Tensor) -> float:
    """Mean of ``cost`` (Cs, Ct) over the matched pairs of ``groups`` (Cs, group size), -1 left out."""
    matched = groups >= 0
    return cost.gather(1, groups.clamp(min=0))[matched].mean().item()
