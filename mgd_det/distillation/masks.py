"""Masks, which say how much each pixel of a feature map counts in a loss.

Shape shorthand: B images, maps of H x W, N boxes of an image.

A mask (B, 1, H, W) is made so that a loss that is the mean over B images and H * W pixels becomes the weighted sum of
the method by a product alone. It is 0 where the map covers padding.
"""

from typing import Sequence, Tuple

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

    On the map, a pixel in a box of h x w pixels weighs ``foreground / (h * w)``, in several boxes by the smallest; one
    of the P pixels outside all boxes weighs ``background / P``. So each box counts as much as another, and all boxes as
    the paper's weights alpha and beta say. The result is H * W times that: without boxes and with ``background`` 1,
    a mask of 1.

    Args:
        boxes: (N, 4) of each image, left, top, right and bottom in pixels of the image; N may be 0.
        padding: the sizes of the images.
        size: H and W of the map. A pixel of the map that a box touches is in the box.
        foreground: >= 0.
        background: >= 0.

    Returns:
        (B, 1, H, W) float32, on the boxes' device.

    Example:
        >>> box_mask([torch.tensor([[0.0, 0.0, 12.0, 8.0]])], Padding([(8, 32)], (8, 32)), (1, 4)).flatten().tolist()
        [2.0, 2.0, 1.0, 1.0]
    """
    height, width = size
    masks = []
    for of_image, (rows, columns) in zip(boxes, padding.cells(size)):
        of_image = of_image.float()
        inside_y, length_y = _inside(of_image[:, 1::2] * (height / padding.padded_size[0]), height, rows)
        inside_x, length_x = _inside(of_image[:, 0::2] * (width / padding.padded_size[1]), width, columns)
        weight = of_image.new_zeros(height, width)
        if len(of_image) > 0:
            inside = inside_y[:, :, None] & inside_x[:, None, :]
            weight = (inside / (length_y * length_x)[:, None, None]).amax(dim=0)
        outside = torch.zeros_like(weight)
        outside[:rows, :columns] = 1
        outside = outside * (weight == 0)
        masks.append(foreground * weight + background * outside / outside.sum().clamp(min=1))
    return torch.stack(masks).unsqueeze(1) * (height * width)


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


def _inside(ends: torch.Tensor, length: int, covered: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return which cells of a side the boxes touch, (N, length) bool, and how many, (N,).

    Args:
        ends: (N, 2), first and last coordinate, in cells.
        length: cells of the side.
        covered: those that the image covers. A box touches at least one.
    """
    first = ends[:, 0].floor().clamp(0, covered - 1)
    last = torch.maximum(ends[:, 1].ceil().clamp(max=covered), first + 1)
    cells = torch.arange(length, device=ends.device)
    return (cells >= first[:, None]) & (cells < last[:, None]), last - first
