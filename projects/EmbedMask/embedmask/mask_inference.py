"""From proposals and pixels to detections with masks of the whole image."""

from typing import List, Sequence, Tuple

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from mgd_det.errors import ArgumentError

_PIXELS_AT_ONCE = 1 << 26  # of the masks that are resized together; 256 MiB in float32


class MaskInference:
    """Makes masks of the image's own size from the probabilities of :func:`embedmask.coupling.mask_probability`.

    Attributes:
        threshold: the probability above which a pixel is in the mask.
    """

    def __init__(self, *, threshold: float = 0.53) -> None:
        """
        Args:
            threshold: see ``MODEL.EMBED_MASK.MASK_THRESH_TEST``.

        Raises:
            ArgumentError: it is not in (0, 1).
        """
        if isinstance(threshold, bool) or not (isinstance(threshold, (int, float)) and 0 < threshold < 1):
            raise ArgumentError("threshold", f"is {threshold!r}; give a number between 0 and 1")
        self.threshold = float(threshold)

    def __call__(
        self, probabilities: Tensor, stride: int, input_size: Tuple[int, int], boxes: Tensor, size: Tuple[int, int]
    ) -> Tensor:
        """Return the masks of an image's detections: pixels of the box whose probability is above the threshold.

        Args:
            probabilities: (N, h, w), of the padded image.
            stride: of them, in pixels of the network's image.
            input_size: (height, width) of the network's image, without padding.
            boxes: (N, 4), in pixels of the image itself.
            size: (H, W) of the image itself.

        Returns:
            (N, H, W) bool.
        """
        masks = torch.zeros((len(boxes), *size), dtype=torch.bool, device=boxes.device)
        y, x = (torch.arange(length, device=boxes.device) + 0.5 for length in size)
        pixels = max(stride**2 * probabilities[0].numel(), size[0] * size[1]) if len(boxes) else 1
        for part in torch.arange(len(boxes), device=boxes.device).split(max(_PIXELS_AT_ONCE // pixels, 1)):
            scaled = F.interpolate(
                probabilities[part][:, None], scale_factor=float(stride), mode="bilinear", align_corners=False
            )[:, :, : input_size[0], : input_size[1]]
            if tuple(size) != tuple(input_size):
                scaled = F.interpolate(scaled, size=size, mode="bilinear", align_corners=False)
            left, top, right, bottom = boxes[part].unbind(dim=1)
            in_rows = (y >= top[:, None]) & (y <= bottom[:, None])
            in_columns = (x >= left[:, None]) & (x <= right[:, None])
            masks[part] = (scaled[:, 0] > self.threshold) & in_rows[:, :, None] & in_columns[:, None, :]
        return masks


def select_proposals(
    scores: Sequence[Tensor],
    boxes: Sequence[Tensor],
    image_size: Tuple[int, int],
    score_threshold: float,
    candidates: int,
    nms_threshold: float,
    detections: int,
) -> Instances:
    """Choose an image's detections as FCOS does, and say which place each comes from.

    Args:
        scores: (R_l, classes) of each level l.
        boxes: (R_l, 4) of each level.
        image_size: (height, width).
        score_threshold: of a detection.
        candidates: of each level before non-maximum suppression.
        nms_threshold: its IoU, within a class.
        detections: at most, of the image.

    Returns:
        Instances with pred_boxes, scores, pred_classes, and places: indices into all levels' places one after another.
    """
    found: List[Tuple[Tensor, ...]] = []
    first = 0
    for level_scores, level_boxes in zip(scores, boxes):
        places, classes = torch.nonzero(level_scores > score_threshold, as_tuple=True)
        best, order = level_scores[places, classes].topk(min(candidates, len(places)))
        places, classes = places[order], classes[order]
        found.append((level_boxes[places], best, classes, places + first))
        first += len(level_scores)
    kept_boxes, kept_scores, classes, places = (torch.cat(parts) for parts in zip(*found))
    keep = batched_nms(kept_boxes, kept_scores, classes, nms_threshold)[:detections]
    return Instances(
        image_size,
        pred_boxes=Boxes(kept_boxes[keep]),
        scores=kept_scores[keep],
        pred_classes=classes[keep],
        places=places[keep],
    )
