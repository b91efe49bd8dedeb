"""From the student's input to the teacher's: each net keeps its own channel order, mean and std."""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode

from mgd_det.errors import ArgumentError


@dataclass(frozen=True)
class PixelFormat:
    """How a detector normalises its pixels: ``(image - mean) / std``, with the channels in the order of ``format``.

    Attributes:
        format: order of the colour channels, "BGR" or "RGB" (or another one, if both nets share it).
        mean, std: one number for each channel, in that order, on the scale 0..255.
    """

    format: str
    mean: Tuple[float, ...]
    std: Tuple[float, ...]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "PixelFormat":
        return cls(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))


class PixelConverter:
    """Turns a batch that is normalised for one detector into the batch that another one would have made."""

    def __init__(self, source: PixelFormat, target: PixelFormat) -> None:
        """
        Args:
            source: what the images are normalised for, the student's detector.
            target: what they are converted to, the teacher's.

        Raises:
            ArgumentError: ``pixels`` (the source) has other colour channels than the target.
        """
        if len(source.mean) != len(target.mean) or sorted(source.format) != sorted(target.format):
            raise ArgumentError(
                "pixels",
                f"is {source.format!r} with {len(source.mean)} channels, but the teacher takes {target.format!r} with "
                f"{len(target.mean)}; use a teacher with the same colour channels",
            )
        self._identity = source == target
        self._order: Optional[List[int]] = None
        if source.format != target.format:
            self._order = [source.format.index(channel) for channel in target.format]
        order = self._order or range(len(source.mean))
        gain = [source.std[i] / std for i, std in zip(order, target.std)]
        shift = [(source.mean[i] - mean) / std for i, mean, std in zip(order, target.mean, target.std)]
        self._affine = torch.tensor([gain, shift]).view(2, 1, -1, 1, 1)

    def __call__(self, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]] = None) -> torch.Tensor:
        """Convert a batch.

        Args:
            images: (B, C, H, W), normalised for the source and padded with zeros.
            image_sizes: height and width of each image without its padding; None if nothing is padded.

        Returns:
            (B, C, H, W), normalised for the target and padded with zeros.
        """
        if self._identity:
            return images
        if self._order is not None:
            images = torch.stack([images[:, i] for i in self._order], dim=1)
        # Kept on the device: a copy to a GPU in every batch would make the host wait.
        self._affine = self._affine.to(images)
        images = images * self._affine[0] + self._affine[1]
        # Both detectors pad after normalisation, so the padding is 0 for both, not the affine of 0.
        for image, (height, width) in zip(images, image_sizes or ()):
            image[:, height:, :] = 0
            image[:, :, width:] = 0
        return images
