"""The optimal assignment of teacher channels to student channels."""

from typing import Optional

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


def assign_channels(cost: torch.Tensor, group_size: Optional[int] = None) -> torch.Tensor:
    """Give every student channel its group of teacher channels, at the least total cost.

    Solves MGD's equation 4 exactly: a binary M (Cs, Ct) minimising sum(M * cost), where each student
    channel gets exactly ``group_size`` distinct teacher channels and a teacher channel serves at
    most one student channel. The costliest teacher channels are left out where Ct is not a multiple of Cs.

    Args:
        cost: (Cs, Ct), finite, in any unit.
        group_size: teacher channels in a group, 1 <= group_size <= Ct / Cs. Default: as many as
            possible, floor(Ct / Cs). Where Cs > Ct it is 1: each teacher channel goes to one
            student channel, and the student channels left without one get -1.

    Returns:
        groups, (Cs, group_size) long on the CPU: row i holds the teacher channels of student
        channel i in ascending order.

    Raises:
        ValueError: the cost is not a finite matrix, or the group size is outside its range.

    Example:
        >>> cost = torch.tensor([[0.1, 3.0, 0.2, 3.5], [2.9, 0.3, 3.1, 0.4]])
        >>> assign_channels(cost)
        tensor([[0, 2],
                [1, 3]])
        >>> assign_channels(cost, group_size=1).tolist()
        [[0], [1]]
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
    # Each student channel stands for `group_size` equal rows of a linear assignment.
    rows, columns = linear_sum_assignment(np.repeat(matrix, group_size, axis=0))
    groups = np.full(num_student * group_size, -1, dtype=np.int64)
    groups[rows] = columns
    return torch.from_numpy(np.sort(groups.reshape(num_student, group_size), axis=1))


def matched_cost(cost: torch.Tensor, groups: torch.Tensor) -> float:
    """Return the mean of ``cost`` (Cs, Ct) over the matched pairs of ``groups`` (Cs, group size); -1 is skipped.

    Example:
        >>> matched_cost(torch.tensor([[0.5, 3.0], [3.0, 1.5]]), torch.tensor([[0], [1]]))
        1.0
    """
    return pair_costs(cost, groups).mean().item()


def pair_costs(cost: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the costs of the matched pairs of ``groups`` (Cs, group size), row by row; -1 is skipped."""
    return cost.gather(1, groups.clamp(min=0))[groups >= 0]


def channel_owners(groups: torch.Tensor, teacher_channels: int) -> torch.Tensor:
    """Return (Ct,): the student channel that each teacher channel serves, -1 for none."""
    owners = torch.full((teacher_channels,), -1)
    students, members = (groups >= 0).nonzero(as_tuple=True)
    owners[groups[students, members]] = students
    return owners
