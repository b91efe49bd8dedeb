"""Which part of a feature map an image covers; the rest is padding."""

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
        return [
            (-(-height * size[0] // self.padded_size[0]), -(-width * size[1] // self.padded_size[1]))
            for height, width in self.image_sizes
        ]
