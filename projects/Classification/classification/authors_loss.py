"""MGD's loss as the authors' classification code scales it."""

from typing import Any, Dict

import torch

from mgd_det.distillation import Position, PositionFeatures, PositionLoss, partial_l2, register_position_loss
from mgd_det.errors import check_positive

# Of the positions at a quarter, an eighth, a sixteenth and a thirty-second of the image: 1 / 2^(3 - i).
AUTHORS_WEIGHTS = {"res2": 0.125, "res3": 0.25, "res4": 0.5, "res5": 1.0}


@register_position_loss("partial_l2_sum")
class SummedPartialL2(PositionLoss):
    """The partial L2 distance, summed over channels and pixels and divided by the images and 1e4.

    The authors sum over the whole batch and divide by its images and by ``loss_factor`` (kaiyuyue/mgd,
    cls/main_mgd.py). The weight of a position grows with its channels and pixels.
    """

    needs_norm = True
    needs_statistics = True
    takes_mask = True

    def __init__(self, *, divisor: float = 1e4) -> None:
        """
        Args:
            divisor: > 0; the authors' is 1e4, for images of 224 x 224 pixels.

        Raises:
            ArgumentError: it is not > 0.
        """
        self.divisor = check_positive("losses.partial_l2_sum.divisor", divisor)

    def __call__(self, position: Position, features: PositionFeatures) -> torch.Tensor:
        total = partial_l2(features.normed, features.target, features.margin, "sum", features.mask)
        return total / (max(features.student.shape[0], 1) * self.divisor)


def authors_losses(positions: Any) -> Dict[str, Dict[str, Any]]:
    """Return the argument ``losses`` of ``distilled_backbone`` with the authors' weights.

    Args:
        positions: "<student's>=<teacher's>" or names of stages; the teacher's stage sets the weight.
    """
    weights = [AUTHORS_WEIGHTS[text.rpartition("=")[2]] for text in positions]
    return {"partial_l2_sum": {"weights": weights, "divisor": 1e4}}
