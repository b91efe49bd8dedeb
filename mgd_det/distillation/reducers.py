"""Reduction of the teacher's channels to the student's, by the groups of the matching (MGD, section 3.3).

Shape shorthand: B images, Ct teacher channels, Cs student channels, groups of K teacher channels,
maps of H x W. Every reducer takes

    teacher: (B, Ct, H, W), the teacher's feature;
    margin: (Ct,), the margin of each teacher channel;
    groups: (Cs, K) long, without -1 (leave unmatched student channels out first);

and returns ``(target, m)``: the reduced feature (B, Cs, H, W) and the margin of each group (Cs,).
No reducer has a parameter, and none is differentiated: the teacher is fixed.
"""

from typing import Callable, Dict, Optional, Tuple

import torch

Reduced = Tuple[torch.Tensor, torch.Tensor]


def absolute_max_pooling(teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor) -> Reduced:
    """AMP: per image, channel and pixel the group's value of largest magnitude, sign kept.

    Of a positive and a negative value of equal magnitude the positive one counts. The margin of a group is its mean.
    """
    groups = _checked(groups, teacher)
    # The largest or the smallest value of the group: a running comparison, where a stack of the group needs K maps.
    high = low = teacher.index_select(1, groups[:, 0])
    for k in range(1, groups.shape[1]):
        member = teacher.index_select(1, groups[:, k])
        high, low = torch.maximum(high, member), torch.minimum(low, member)
    return torch.where(high >= -low, high, low), margin[groups].mean(dim=1)


def random_drop(
    teacher: torch.Tensor,
    margin: torch.Tensor,
    groups: torch.Tensor,
    generator: Optional[torch.Generator] = None,
) -> Reduced:
    """RD: per image, channel and pixel one member of the group at random; per group one margin.

    Args:
        generator: of the features' device; default: that device's global one.
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
    """SM: the one teacher channel that the matching gives each student channel, with its own margin."""
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
    # An index out of range is left to index_select, which sees it without a wait for the device.
    return groups.to(teacher.device)
