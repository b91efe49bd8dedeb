"""What the mask loss of an image is computed from: its objects' proposals and the pixels of their masks.

Shape shorthand: M objects, R places of the detector in all levels, (h, w) the mask map, s its stride in pixels.
"""

from dataclasses import dataclass
from typing import Tuple

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class MaskSamples:
    """The objects of one image that have a mask loss.

    Attributes:
        places: (N,) the places whose proposals are of an object.
        owners: (N,) of each, the object's index in ``labels``. Every object has one or more.
        labels: (m, h, w) bool, the objects' masks.
        region: (m, h, w) bool, the pixels that count.
    """

    places: Tensor
    owners: Tensor
    labels: Tensor
    region: Tensor


def mask_samples(
    objects: Tensor,
    boxes: Tensor,
    masks: Tensor,
    image_size: Tuple[int, int],
    map_size: Tuple[int, int],
    stride: int,
    padding: float,
) -> MaskSamples:
    """Choose the proposals and pixels of the mask loss.

    Objects without a place, or too thin for the map, are left out.

    Args:
        objects: (R,) the object of each place, -1 for none.
        boxes: (M, 4) of the objects.
        masks: (M, H, W) bool, of the image's size.
        image_size: (H, W), without the padding of the batch.
        map_size: (h, w).
        stride: s.
        padding: see ``MODEL.EMBED_MASK.BOX_PADDING``.
    """
    labels = small_masks(masks, map_size, stride)
    places = torch.nonzero(objects >= 0).flatten()
    places = places[labels.flatten(1).any(dim=1)[objects[places]]]
    kept, owners = torch.unique(objects[places], return_inverse=True)
    region = padded_regions(boxes[kept], image_size, map_size, stride, padding)
    return MaskSamples(places, owners, labels[kept], region)


def image_masks(instances: Instances, device: torch.device) -> Tensor:
    """Return the ground truth of an image as (M, H, W) bool. Without an object, it needs no ``gt_masks``."""
    if len(instances) == 0:
        return torch.zeros((0, *instances.image_size), dtype=torch.bool, device=device)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks.tensor.to(device)


def small_masks(masks: Tensor, map_size: Tuple[int, int], stride: int) -> Tensor:
    """Return the masks (M, H, W) at a stride, (M, h, w) bool: the cells of which half or more is in the object."""
    height, width = (size * stride for size in map_size)
    padded = F.pad(masks.float(), (0, width - masks.shape[2], 0, height - masks.shape[1]))
    return F.avg_pool2d(padded[:, None], stride)[:, 0] >= 0.5


def padded_regions(
    boxes: Tensor, image_size: Tuple[int, int], map_size: Tuple[int, int], stride: int, padding: float
) -> Tensor:
    """Return the cells whose centres lie in the enlarged boxes and in the image, (M, h, w) bool."""
    margins = padding * (boxes[:, 2:] - boxes[:, :2])
    low, high = (boxes[:, :2] - margins).clamp(min=0), boxes[:, 2:] + margins
    high = torch.minimum(high, high.new_tensor(image_size[::-1]))
    y, x = ((torch.arange(size, device=boxes.device) + 0.5) * stride for size in map_size)
    in_columns = (x >= low[:, :1]) & (x < high[:, :1])
    in_rows = (y >= low[:, 1:]) & (y < high[:, 1:])
    return in_rows[:, :, None] & in_columns[:, None, :]
