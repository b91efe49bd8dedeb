"""Which part of a feature map an image covers; the rest is padding."""

import math
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import torch


@dataclass(frozen=True)
class Padding:
    """The sizes of a batch's images, which are padded at the right and at the bottom to a common size.

    Attributes:
        image_sizes: (height, width) of each image, in pixels.
        padded_size: (height, width) of the batch, in pixels.
    """

    image_sizes: Sequence[Tuple[int, int]]
    padded_size: Tuple[int, int]

    def covered(self, feature: torch.Tensor) -> List[torch.Tensor]:
        """Return of a feature (B, C, H, W) the part that each image covers, (C, h, w), without a copy.

        A row or column that an image covers in part counts.

        Example:
            >>> feature = torch.zeros(2, 7, 4, 8)  # stride 8
            >>> first, second = Padding([(32, 33), (9, 64)], (32, 64)).covered(feature)
            >>> tuple(first.shape), tuple(second.shape)
            ((7, 4, 5), (7, 2, 8))
        """
        return [image[:, :height, :width] for image, (height, width) in zip(feature, self.cells(feature.shape[2:]))]

    def cells(self, size: Sequence[int]) -> List[Tuple[int, int]]:
        """Return the rows and columns that each image covers of a map of this size, H and W."""
        strides = self.strides(size)
        return [(math.ceil(height / strides[0]), math.ceil(width / strides[1])) for height, width in self.image_sizes]

    def strides(self, size: Sequence[int]) -> Tuple[float, float]:
        """Return how many pixels a row and a column of a map of this size, H and W, stand for.

        A map covers the padded size or a little more: an FPN pads to a multiple of 32, so the stride of p6 and p7, 64
        and 128, need not divide it. Where a power of two gives a map of this size, that is the stride.

        Example:
            >>> Padding([], (800, 1344)).strides((7, 11))
            (128, 128)
        """
        height, width = (_stride(padded, cells) for padded, cells in zip(self.padded_size, size))
        return height, width


def _stride(padded: int, cells: int) -> float:
    power = 1 << (math.ceil(padded / cells) - 1).bit_length()  # the least that is not below padded / cells
    return power if math.ceil(padded / power) == cells else padded / cells
