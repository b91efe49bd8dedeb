"""How likely a pixel belongs to a proposal: the distance of their embeddings.

Shape shorthand: K proposals or objects, P pixels, D dimensions of an embedding.
"""

import torch
from torch import Tensor


def mask_probability(pixels: Tensor, proposals: Tensor, margins: Tensor) -> Tensor:
    """Return exp(-sum_d m_d (p_d - q_d)^2) for each proposal and pixel, by two matrix products.

    The sum is m . p^2 - 2 (m q) . p + m . q^2, so no tensor of K * P * D values is needed. It is computed in float32,
    under autocast too: the three terms nearly cancel where a pixel fits.

    This is the mask probability of EmbedMask (Ying et al., arXiv:1912.01954), a Gaussian of the distance, with a margin
    m = 1 / (2 sigma^2) for each dimension.

    Args:
        pixels: embeddings p, (D, P).
        proposals: embeddings q, (K, D).
        margins: m >= 0, (K, D).

    Returns:
        (K, P) float32 in [0, 1].
    """
    with torch.autocast(pixels.device.type, enabled=False):
        pixels, proposals, margins = pixels.float(), proposals.float(), margins.float()
        weighted = margins * proposals
        distance = margins @ pixels.square() - 2 * (weighted @ pixels)
        distance = distance + (weighted * proposals).sum(dim=1, keepdim=True)
        return torch.exp(-distance.clamp(min=0))  # rounding may leave less than 0


def add_location(embeddings: Tensor, locations: Tensor, unit: float, dim: int) -> Tensor:
    """Add locations to the first two dimensions of embeddings.

    A convolution does not know where it is, so two objects that look alike would have the same embedding.

    Args:
        embeddings: with D >= 2 dimensions.
        locations: (n, 2), x and y in pixels of the network's image.
        unit: pixels in a distance of 1.
        dim: the axis of D, followed by an axis of n or preceded by one.

    Returns:
        The embeddings in float32.
    """
    embeddings = embeddings.float()
    offsets = (locations / unit).to(embeddings)
    dim %= embeddings.dim()
    if dim != embeddings.dim() - 1:
        offsets = offsets.t()
    first, rest = embeddings.split([2, embeddings.shape[dim] - 2], dim=dim)
    return torch.cat([first + offsets, rest], dim=dim)
