"""The depthwise-separable convolution that comes closest to a full one."""

from typing import Tuple

import torch
from torch import Tensor


def closest_separable(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Split a convolution's weight into a depthwise and a pointwise one.

    For each input channel, the kernels of all outputs become multiples of one kernel: the first singular vectors of
    the matrix of outputs by places. No other separable convolution has a smaller squared error of the weights (Eckart
    and Young, 1936), and none is lost where the weight is separable. Both factors get the root of the singular value.

    Args:
        weight: (O, C, kH, kW), of a convolution with one group.

    Returns:
        The depthwise weight, (C, 1, kH, kW), and the pointwise weight, (O, C, 1, 1).

    Example:
        >>> weight = torch.ones(2, 1, 3, 3) * torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)
        >>> depthwise, pointwise = closest_separable(weight)
        >>> torch.allclose(pointwise * depthwise.transpose(0, 1), weight)
        True
    """
    kernels = weight.double().flatten(2).transpose(0, 1)  # (C, O, places)
    left, values, right = torch.linalg.svd(kernels, full_matrices=False)
    root = values[:, :1].sqrt()
    depthwise = (root * right[:, 0]).view(weight.shape[1], 1, *weight.shape[2:])
    pointwise = (root * left[:, :, 0]).T[:, :, None, None]
    return depthwise.to(weight), pointwise.to(weight)
