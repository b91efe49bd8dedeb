"""The Lovasz hinge of masks.

Shape shorthand: K masks, P pixels.
"""

import torch
from torch import Tensor


def lovasz_hinge(probabilities: Tensor, labels: Tensor, region: Tensor) -> Tensor:
    """Return the Lovasz hinge of each mask: the Lovasz extension of 1 - IoU at the pixels' hinge errors.

    A pixel's error is max(0, 1 - s (2 probability - 1)), where s is 1 in the object and -1 outside: 0 to 2, and 1 at
    a probability of 0.5. See Berman et al., "The Lovasz-Softmax loss", CVPR 2018, and its algorithm 1.

    Args:
        probabilities: (K, P) float, in [0, 1].
        labels: (K, P) bool, the pixels of the object.
        region: (K, P) bool, the pixels that count.

    Returns:
        (K,) float; for a mask without a pixel of its object in the region, its highest error.
    """
    labels = labels & region
    signs = labels.to(probabilities) * 2 - 1
    errors = (1 - signs * (2 * probabilities - 1)).clamp(min=0)
    # Pixels that do not count come last and weigh nothing.
    errors, order = errors.masked_fill(~region, -1.0).sort(dim=1, descending=True, stable=True)
    labels = labels.gather(1, order).to(errors)
    objects = labels.sum(dim=1, keepdim=True)
    # 1 - IoU if all pixels with an error this high or higher are wrong, and its growth from pixel to pixel.
    intersection = objects - labels.cumsum(dim=1)
    union = objects + (1 - labels).cumsum(dim=1)
    loss = 1 - intersection / union
    growth = torch.diff(loss, dim=1, prepend=loss.new_zeros(len(loss), 1))
    return (errors.clamp(min=0) * growth).sum(dim=1)
