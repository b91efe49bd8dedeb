"""Depthwise-separable convolutions in place of those of an FPN or a head.

Shape shorthand in this module: B images, C channels, H and W pixels, k the side of a kernel.
"""

from typing import Any, TypeVar

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from mgd_det.errors import ArgumentError

Module = TypeVar("Module", bound=nn.Module)
# The child of an FPN that is a network of its own.
_BOTTOM_UP = "bottom_up"


class SeparableConv2d(Conv2d):
    """A depthwise k x k convolution, then a pointwise 1 x 1 one with norm and activation, as in EfficientDet's heads.

    With C channels in and out it has C * (k^2 + C) weights in place of C^2 * k^2. (MobileNets, arXiv:1704.04861,
    section 3.1; EfficientDet, arXiv:1911.09070.) ``weight``, ``bias``, ``norm`` and ``activation`` are the pointwise
    part's; the child ``depthwise`` has no bias, norm or activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        **options: Any,
    ) -> None:
        """
        Args:
            in_channels: of the input.
            out_channels: of the output.
            kernel_size: k, of the depthwise part.
            stride: of the depthwise part.
            padding: of the depthwise part.
            dilation: of the depthwise part.
            options: ``bias``, ``norm`` and ``activation`` of :class:`detectron2.layers.Conv2d`.
        """
        super().__init__(in_channels, out_channels, kernel_size=1, **options)
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, padding, dilation, groups=in_channels, bias=False
        )
        # The squares of a kernel's weights sum to 1 in the mean: it leaves the scale of a map as it is.
        nn.init.normal_(self.depthwise.weight, std=1 / kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        return super().forward(self.depthwise(x))


@torch.no_grad()
def separable_from(convolution: nn.Conv2d) -> SeparableConv2d:
    """Return the separable convolution for a dense one that has its initial weights.

    The outputs of both have the same mean square for random weights, so that a layer starts as its initialiser means
    it to: the pointwise weights are the middle weight of each kernel, times k. Bias, norm and activation are the dense
    one's own.

    Args:
        convolution: with a square kernel and one group, of torch or Detectron2.
    """
    k = convolution.kernel_size[0]
    made = SeparableConv2d(
        convolution.in_channels,
        convolution.out_channels,
        k,
        convolution.stride,  # type: ignore[arg-type]  # a pair
        convolution.padding,  # type: ignore[arg-type]
        convolution.dilation,  # type: ignore[arg-type]
        bias=False,
        norm=getattr(convolution, "norm", None),
        activation=getattr(convolution, "activation", None),
    ).to(convolution.weight)
    made.weight.copy_(k * convolution.weight[:, :, k // 2, k // 2, None, None])
    made.bias = convolution.bias
    return made


def make_separable(module: Module) -> Module:
    """Replace each dense convolution with a kernel larger than 1 x 1 by :func:`separable_from`, in place.

    Args:
        module: an FPN, whose bottom-up network stays as it is, or a head; just built, because trained weights are lost.

    Returns:
        The same module.

    Raises:
        ArgumentError: it has no such convolution.
    """
    if not _replace(module):
        raise ArgumentError("module", f"is a {type(module).__name__} without a dense convolution larger than 1 x 1")
    return module


def _replace(owner: nn.Module) -> int:
    replaced = 0
    for name, child in list(owner.named_children()):
        if name == _BOTTOM_UP:
            continue
        if not _is_dense(child):
            replaced += _replace(child)
            continue
        made = separable_from(child)  # type: ignore[arg-type]
        setattr(owner, name, made)
        # Detectron2's FPN runs its convolutions from lists, which are no children.
        for value in vars(owner).values():
            if isinstance(value, list):
                value[:] = [made if item is child else item for item in value]
        replaced += 1
    return replaced


def _is_dense(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or isinstance(module, SeparableConv2d):
        return False
    k, other = module.kernel_size
    return k == other > 1 and module.groups == 1
