"""The mask tower: an embedding for every pixel."""

from typing import List

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from mgd_det.errors import ArgumentError

UPSAMPLING = 2  # from the stride of p3, 8, to that of the masks, 4


class PixelHead(nn.Module):
    """The pixel head of EmbedMask (arXiv:1912.01954), on the largest level of the FPN.

    Attributes:
        dim: D, the dimensions of an embedding.
        stride: of the embeddings, in pixels of the image.
    """

    def __init__(self, *, input_shape: ShapeSpec, dim: int = 32, num_convs: int = 4, norm: str = "GN") -> None:
        """
        Args:
            input_shape: of the level, with channels and stride.
            dim: of the embeddings.
            num_convs: convolutions of 3 x 3 before the one that makes the embeddings.
            norm: name of :func:`detectron2.layers.get_norm`; "" for none.

        Raises:
            ArgumentError: a value cannot be used.
        """
        super().__init__()
        if isinstance(num_convs, bool) or not isinstance(num_convs, int) or num_convs < 0:
            raise ArgumentError("num_convs", f"is {num_convs!r}; give a whole number >= 0")
        stride = input_shape.stride or 0
        if stride < UPSAMPLING or stride % UPSAMPLING:
            raise ArgumentError("input_shape", f"has the stride {input_shape.stride}; give a level of an even stride")
        self.dim, self.stride = dim, stride // UPSAMPLING
        channels = input_shape.channels or 0
        layers: List[nn.Module] = []
        for _ in range(num_convs):
            layers.append(
                Conv2d(
                    channels,
                    channels,
                    kernel_size=3,
                    padding=1,
                    bias=not norm,
                    norm=get_norm(norm, channels),
                    activation=F.relu,
                )
            )
        self.tower = nn.Sequential(*layers)
        self.embedding = nn.Conv2d(channels, dim, kernel_size=3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """Return (B, D, 2 H, 2 W) of (B, C, H, W)."""
        embeddings = self.embedding(self.tower(feature)).float()
        return F.interpolate(embeddings, scale_factor=float(UPSAMPLING), mode="bilinear", align_corners=False)
