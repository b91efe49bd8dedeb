"""EmbedMask's two losses: of the masks, and of the proposals of one object, which must agree.

Shape shorthand: B images, R places of the detector in all levels, D dimensions of an embedding, (h, w) the mask map.
"""

from typing import Dict, List, Sequence

import torch
from torch import Tensor

from embedmask.coupling import mask_probability
from embedmask.lovasz import lovasz_hinge
from embedmask.mask_samples import MaskSamples
from mgd_det.errors import check_not_negative


class MaskLoss:
    """The losses of EmbedMask beside FCOS's (arXiv:1912.01954).

    Embedding and margins of an object are the means over its proposals. ``loss_mask`` is the Lovasz hinge of the
    object's mask, the mean over objects. ``loss_mask_smooth`` is the mean over objects of the mean over an object's
    proposals of the squared distances of embedding and margins to these means.

    Attributes:
        box_padding: see ``MODEL.EMBED_MASK.BOX_PADDING``.
    """

    def __init__(self, *, box_padding: float = 0.1, mask_weight: float = 0.5, smooth_weight: float = 0.1) -> None:
        """
        Args:
            box_padding: see ``MODEL.EMBED_MASK``.
            mask_weight: of ``loss_mask``.
            smooth_weight: of ``loss_mask_smooth``.

        Raises:
            ArgumentError: a value is negative.
        """
        self.box_padding = check_not_negative("box_padding", box_padding)
        self._mask_weight = check_not_negative("mask_weight", mask_weight)
        self._smooth_weight = check_not_negative("smooth_weight", smooth_weight)

    def __call__(
        self, pixels: Tensor, embeddings: Tensor, margins: Tensor, samples: Sequence[MaskSamples]
    ) -> Dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            pixels: embeddings (B, D, h, w).
            embeddings: of the proposals, (B, R, D).
            margins: of the proposals, (B, R, D).
            samples: of each image.

        Returns:
            "loss_mask" and "loss_mask_smooth", weighted scalars; 0 without an object.
        """
        masks: List[Tensor] = []
        distances: List[Tensor] = []
        for image, sample in enumerate(samples):
            count = len(sample.labels)
            if count == 0:
                continue
            own = torch.cat([embeddings[image, sample.places], margins[image, sample.places]], dim=1).float()
            means = mean_by_owner(own, sample.owners, count)
            distances.append(mean_by_owner((own - means[sample.owners]).square().sum(1), sample.owners, count))
            probabilities = mask_probability(pixels[image].flatten(1), *means.chunk(2, dim=1))
            masks.append(lovasz_hinge(probabilities, sample.labels.flatten(1), sample.region.flatten(1)))
        if not masks:
            # Every parameter gets a gradient, as DistributedDataParallel expects.
            nothing = 0.0 * (pixels.sum() + embeddings.sum() + margins.sum())
            return {"loss_mask": nothing, "loss_mask_smooth": nothing}
        return {
            "loss_mask": self._mask_weight * torch.cat(masks).mean(),
            "loss_mask_smooth": self._smooth_weight * torch.cat(distances).mean(),
        }


def mean_by_owner(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """Return the mean of the values of each owner.

    Args:
        values: (N, ...).
        owners: (N,) of each value, 0 to ``count`` - 1; every owner has one or more.
        count: number of owners.

    Returns:
        (count, ...).
    """
    sums = values.new_zeros(count, *values.shape[1:]).index_add(0, owners, values)
    numbers = torch.bincount(owners, minlength=count).to(values)
    return sums / numbers.reshape(-1, *[1] * (values.dim() - 1))
