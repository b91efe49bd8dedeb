"""Reduction of the teacher's channels to the student's, by the groups of the matching (MGD, section 3.3).

Shape shorthand: B images, Ct teacher channels, Cs student channels, groups of K teacher channels,
maps of H x W. Every reducer takes

    teacher: (B, Ct, H, W), the teacher's feature;
    margin: (Ct,), the margin of each teacher channel;
    groups: (Cs, K) long, without -1 (leave unmatched student channels out first);

and returns ``(target, m)``: the reduced feature (B, Cs, H, W) and the margin of each group (Cs,).
It raises ValueError if the groups are not a long matrix. Reducers have no parameters.
"""

from typing import Callable, Dict, Optional, Tuple

import torch

Reduced = Tuple[torch.Tensor, torch.Tensor]


def absolute_max_pooling(teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor) -> Reduced:
    """Take, per image, channel and pixel, the group's value of largest magnitude with its sign (AMP).

    Of a positive and a negative value of equal magnitude the positive one counts. The margin of a group is its mean.

    Example:
        >>> teacher = torch.tensor([[1.0, 2.0], [-4.0, 1.0]]).view(1, 2, 1, 2)
        >>> target, margin = absolute_max_pooling(teacher, torch.tensor([-1.0, -3.0]), torch.tensor([[0, 1]]))
        >>> target.flatten().tolist(), margin.tolist()
        ([-4.0, 2.0], [-2.0])
    """
    groups = _checked(groups, teacher)
    return largest_in_magnitude(teacher, groups), margin[groups].mean(dim=1)


def largest_in_magnitude(teacher: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return a new (B, Cs, H, W): of each group the value with the largest magnitude, of equal ones the positive."""
    # The largest or the smallest, by a running comparison: a stack of the group would need K maps.
    high = teacher.index_select(1, groups[:, 0])
    if groups.shape[1] == 1:
        return high
    low = high.clone()
    for k in range(1, groups.shape[1]):
        member = teacher.index_select(1, groups[:, k])
        torch.maximum(high, member, out=high)
        torch.minimum(low, member, out=low)
    return torch.where(high >= -low, high, low)


def random_drop(
    teacher: torch.Tensor,
    margin: torch.Tensor,
    groups: torch.Tensor,
    generator: Optional[torch.Generator] = None,
) -> Reduced:
    """Draw, per image, channel and pixel, one member of the group at random, and per group one margin (RD).

    Args:
        generator: of the features' device; default: that device's global one.

    Example:
        >>> teacher, groups = torch.arange(4.0).view(1, 4, 1, 1), torch.tensor([[0, 1], [2, 3]])
        >>> target, margin = random_drop(teacher, -torch.ones(4), groups, torch.Generator().manual_seed(0))
        >>> (target // 2).flatten().tolist()
        [0.0, 1.0]
    """
    groups = _checked(groups, teacher)
    size = groups.shape[1]
    target = teacher.index_select(1, groups[:, 0])
    device = teacher.device
    choice = torch.randint(size, target.shape, device=device, generator=generator)
    for k in range(1, size):
        target = torch.where(choice == k, teacher.index_select(1, groups[:, k]), target)
    pick = torch.randint(size, (groups.shape[0], 1), device=device, generator=generator)
    return target, margin[groups.gather(1, pick).squeeze(1)]


def sparse_matching(teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor) -> Reduced:
    """Take the one teacher channel that the matching gives each student channel, with its own margin (SM).

    Raises:
        ValueError: groups of more than one channel.

    Example:
        >>> target, margin = sparse_matching(
        ...     torch.tensor([5.0, 7.0]).view(1, 2, 1, 1), torch.tensor([-1.0, -3.0]), torch.tensor([[1]])
        ... )
        >>> target.flatten().tolist(), margin.tolist()
        ([7.0], [-3.0])
    """
    groups = _checked(groups, teacher)
    if groups.shape[1] != 1:
        raise ValueError(
            f"sparse matching takes groups of one teacher channel, got {groups.shape[1]}: "
            "use assign_channels(cost, group_size=1)"
        )
    channels = groups[:, 0]
    return teacher.index_select(1, channels), margin[channels]


REDUCERS: Dict[str, Callable[..., Reduced]] = {
    "amp": absolute_max_pooling,
    "rd": random_drop,
    "sm": sparse_matching,
}
"""Reducers by their name in the config."""


def _checked(groups: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    if groups.dim() != 2 or groups.dtype != torch.long:
        raise ValueError(f"groups must be a long tensor (Cs, K), got {groups.dtype} {tuple(groups.shape)}")
    # An index out of range is left to index_select, which finds it without making the host wait for the device.
    return groups.to(teacher.device)
