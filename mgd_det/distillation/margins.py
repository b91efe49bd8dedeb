"""Margins of the marginal ReLU: how far below zero a teacher channel is worth following.

From "A Comprehensive Overhaul of Feature Distillation" (Heo et al., ICCV 2019), section 3.1: the
margin of a channel is the expectation of its negative responses.
"""

import math

import torch
import torch.distributed as dist


def negative_margin(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """E[x | x < 0] of x ~ N(bias, weight^2), as the channel's last norm layer describes it.

    With phi and Phi the density and distribution of N(0, 1), it is
    ``bias - |weight| * phi(bias / weight) / Phi(-bias / |weight|)``; where x is almost never negative,
    Phi <= 0.001, it is ``-3 |weight|``. A zero weight is a constant: itself where negative, else 0.

    Args:
        weight, bias: (C,), the norm layer's affine parameters.

    Returns:
        (C,) <= 0 of the dtype and device of ``bias``.
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


class MeasuredMargin:
    """Mean of each channel's negative values over many images: the same margin, without a norm layer.

    It serves features that have no norm layer, or whose statistics were folded into its affine
    parameters (Detectron1's weights), which then no longer describe the output.
    """

    def __init__(self, channels: int) -> None:
        self._sums = torch.zeros(2, channels, dtype=torch.float64)  # of the negative values; their number

    @torch.no_grad()
    def update(self, feature: torch.Tensor) -> None:
        """Adds a batch, (B, C, H, W). Nothing is read back from the device."""
        value = feature.float().clamp(max=0).sum(dim=(0, 2, 3), dtype=torch.float64)
        number = (feature < 0).sum(dim=(0, 2, 3)).double()
        self._sums = self._sums.to(feature.device) + torch.stack([value, number])

    def all_reduce(self) -> None:
        """Sums over all ranks of the default process group."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)

    def mean(self) -> torch.Tensor:
        """(C,) float32 <= 0 on the CPU; 0 for a channel that was never negative."""
        value, number = self._sums.cpu()
        return (value / number.clamp(min=1)).float()
