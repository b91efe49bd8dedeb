"""Masks, which say how much each pixel of a feature map counts in a loss.

Shape shorthand: B images, maps of H x W, N boxes of an image.

A mask (B, 1, H, W) is made so that a loss that is the mean over B images and H * W pixels becomes the weighted sum of
the method by a product alone. It is 0 where the map covers padding.
"""

from typing import Sequence, Tuple

import numpy as np
import torch

from mgd_det.distillation.padding import Padding


def box_mask(
    boxes: Sequence[torch.Tensor],
    padding: Padding,
    size: Tuple[int, int],
    foreground: float = 1.0,
    background: float = 0.5,
) -> torch.Tensor:
    """Weight boxes by their area (FGD; Yang et al., CVPR 2022, its binary mask and scale mask).

    On the map, a pixel in a box of h x w pixels weighs ``foreground / (h * w)``; in several boxes, that of the smallest
    counts. Each of the P pixels outside all boxes weighs ``background / P``. So a small box counts as much as a large
    one; ``foreground`` and ``background`` are the paper's weights alpha and beta. The result is H * W times that:
    without boxes and with ``background`` 1, a mask of 1.

    Args:
        boxes: (N, 4) of each image, left, top, right and bottom in pixels of the image; N may be 0.
        padding: the sizes of the images.
        size: H and W of the map. A pixel of the map that a box touches is in the box.
        foreground: >= 0.
        background: >= 0.

    Returns:
        (B, 1, H, W) float32, on the CPU.

    Example:
        >>> box_mask([torch.tensor([[0.0, 0.0, 12.0, 8.0]])], Padding([(8, 32)], (8, 32)), (1, 4)).flatten().tolist()
        [2.0, 2.0, 1.0, 1.0]
    """
    # In numpy, box by box, from the largest to the smallest: images have few boxes, and no map of each is made.
    strides = np.array(padding.strides(size)[::-1])  # of x and y
    masks = []
    for of_image, (rows, columns) in zip(boxes, padding.cells(size)):
        corners = of_image.cpu().numpy().reshape(-1, 2, 2) / strides
        # At least one pixel, and none of the padding.
        first = np.clip(np.floor(corners[:, 0]), 0, (columns - 1, rows - 1)).astype(int)
        last = np.clip(np.ceil(corners[:, 1]), first + 1, (columns, rows)).astype(int)
        areas = (last - first).prod(axis=1)
        mask, outside = np.zeros(size, np.float32), np.zeros(size, bool)
        outside[:rows, :columns] = True
        for k in np.argsort(-areas):
            inside = slice(first[k, 1], last[k, 1]), slice(first[k, 0], last[k, 0])
            mask[inside], outside[inside] = foreground / areas[k], False
        mask[outside] = background / max(outside.sum(), 1)
        masks.append(mask)
    return torch.from_numpy(np.stack(masks)).unsqueeze(1) * (size[0] * size[1])


def score_mask(scores: torch.Tensor, padding: Padding) -> torch.Tensor:
    """Weight pixels by the teacher's highest score (FRS; Du et al., NeurIPS 2021).

    The authors' code (duzhixing/FRS) divides by the sum of the scores of the batch. So the result is B * H * W times
    the score over that sum, and its mean is 1.

    Args:
        scores: (B, 1, H, W) in [0, 1].
        padding: the sizes of the images.

    Returns:
        (B, 1, H, W), at least float32.

    Example:
        >>> score_mask(torch.tensor([0.75, 0.25]).view(1, 1, 1, 2), Padding([(8, 16)], (8, 16))).flatten().tolist()
        [1.5, 0.5]
    """
    mask = torch.zeros_like(scores, dtype=torch.promote_types(scores.dtype, torch.float32))
    for into, covered in zip(padding.covered(mask), padding.covered(scores)):
        into.copy_(covered)
    total = mask.sum()
    return mask * (mask.numel() / torch.where(total > 0, total, 1.0))
