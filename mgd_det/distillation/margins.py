"""Margins of the marginal ReLU: down to which negative value the student follows a teacher channel.

From "A Comprehensive Overhaul of Feature Distillation" (Heo et al., ICCV 2019), section 3.1: the
margin of a channel is the expectation of its negative responses.
"""

import math
from typing import Optional

import torch

from mgd_det.distillation.padding import Padding


def negative_margin(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute E[x | x < 0] of x ~ N(bias, weight^2), as the channel's last norm layer describes it.

    With phi and Phi the density and distribution of N(0, 1), it is
    ``bias - |weight| * phi(bias / weight) / Phi(-bias / |weight|)``; where x is almost never negative,
    Phi <= 0.001, it is ``-3 |weight|``. A zero weight is a constant: itself where negative, else 0.

    Args:
        weight: (C,), the norm layer's affine parameters.
        bias: (C,), of the same layer.

    Returns:
        (C,) <= 0 of the dtype and device of ``bias``.

    Example:
        >>> negative_margin(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, -3.0]))
        tensor([-0.7979, -1.5958, -3.0000])
    """
    scale, mean = weight.detach().double().abs(), bias.detach().double()
    constant = scale == 0
    z = mean / torch.where(constant, torch.ones_like(scale), scale)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    negative = torch.special.ndtr(-z)
    often = negative > 0.001
    margin = torch.where(
        often, mean - scale * density / torch.where(often, negative, torch.ones_like(negative)), -3 * scale
    )
    return torch.where(constant, mean.clamp(max=0), margin).to(bias.dtype)


# Values of a block on the CPU, so that its temporaries stay in the cache. (On a GPU a block is an image.)
_BLOCK = 2**17


class MeasuredMargin:
    """Mean of each channel's negative values over many images: the same margin, without a norm layer.

    Use it for features that have no norm layer, or whose statistics were folded into its affine
    parameters (Detectron1's weights), which then no longer describe the output.

    Attributes:
        sums: (2, C) float64 on the feature's device: the sums of the negative values, and their numbers. Add the sums
            of several ranks or runs to get the margins over all their images.

    Example:
        >>> margin = MeasuredMargin(channels=2)
        >>> margin.update(torch.tensor([[-1.0, -3.0, 5.0], [0.0, 1.0, 2.0]]).view(1, 2, 1, 3))
        >>> margin.mean().tolist()
        [-2.0, 0.0]
    """

    def __init__(self, channels: int) -> None:
        self.sums = torch.zeros(2, channels, dtype=torch.float64)

    @torch.no_grad()
    def update(self, feature: torch.Tensor, padding: Optional[Padding] = None, *, only_finite: bool = False) -> None:
        """Add a batch, (B, C, H, W). Nothing is read back from the device.

        Args:
            padding: if given, only the part of the maps that the images cover counts.
            only_finite: leave out a batch with a value that is not finite.
        """
        batch = torch.zeros(self.sums.shape, dtype=torch.float64, device=feature.device)
        channels = feature.shape[1]
        if feature.device.type == "cpu":
            channels = max(_BLOCK // max(feature.shape[2:].numel(), 1), 1)
        for image in feature if padding is None else padding.covered(feature):
            for block, (values, numbers) in zip(image.flatten(1).split(channels), batch.split(channels, dim=1)):
                negative = block.float().clamp(max=0)
                values += negative.sum(dim=1)
                numbers += negative.lt_(0).sum(dim=1)
        if only_finite:
            batch = torch.where(batch.sum().isfinite(), batch, 0.0)
        self.sums = self.sums.to(batch.device).add_(batch)

    def mean(self) -> torch.Tensor:
        """Return the margins, (C,) float32 <= 0 on the CPU; 0 for a channel that was never negative."""
        value, number = self.sums.cpu()
        return (value / number.clamp(min=1)).float()
