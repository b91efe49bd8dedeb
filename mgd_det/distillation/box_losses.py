"""Losses between the boxes of student and teacher: functions of tensors.

They are computed in float32, also under autocast. Only the student gets a gradient.
"""

from typing import Optional

import torch
from torchvision.ops import generalized_box_iou_loss


def weighted_giou_loss(
    student: torch.Tensor, teacher: torch.Tensor, scores: torch.Tensor, normalizer: Optional[float] = None
) -> torch.Tensor:
    """Compute the GIoU loss (Rezatofighi et al., CVPR 2019) of each box, weighted by the teacher's score.

    Dense prediction mimicking weighs a place by the teacher's highest class score (Wang et al., CVPR 2024,
    arXiv:2306.11369, in the authors' code). A box of the teacher without area has no shape to teach and does not count.

    Args:
        student: (R, 4) boxes, x1, y1, x2, y2 in pixels.
        teacher: the same of the teacher.
        scores: (R,) scores of the teacher's boxes, in [0, 1].
        normalizer: what the sum is divided by, > 0; None for the sum of the weights, at least 1: a weighted mean.

    Returns:
        A scalar >= 0; without boxes, 0.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> round(weighted_giou_loss(boxes, boxes / 2, torch.ones(1)).item(), 4)
        0.75
    """
    student, teacher = student.float(), teacher.detach().float()
    has_area = (teacher[:, 2:] > teacher[:, :2]).all(dim=1)
    weights = scores.detach().float() * has_area
    total = (weights * generalized_box_iou_loss(student, teacher)).sum()
    return total / (weights.sum().clamp(min=1) if normalizer is None else normalizer)
