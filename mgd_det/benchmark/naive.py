"""The straightforward implementation of reduction and loss, which the fast one is compared with."""

import torch


def naive_partial_l2(
    student: torch.Tensor, teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """Compute absolute max pooling, marginal ReLU and partial L2, one step of the paper at a time; the sum.

    Args:
        student: (B, Cs, H, W).
        teacher: (B, Ct, H, W).
        margin: (Ct,) <= 0.
        groups: (Cs, K) long.
    """
    members = torch.stack([teacher[:, group] for group in groups.unbind(1)], dim=2)  # (B, Cs, K, H, W)
    largest = members.abs().argmax(dim=2, keepdim=True)
    target = members.gather(2, largest).squeeze(2)
    target = torch.max(target, margin[groups].mean(dim=1).view(1, -1, 1, 1))
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).sum()
