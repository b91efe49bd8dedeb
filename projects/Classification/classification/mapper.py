"""From an entry of a data set to the input of a classifier or of MoCo."""

from typing import Any, Callable, Dict, Optional

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mgd_det.errors import UserError

Transform = Callable[[Image.Image], Image.Image]


class ClassificationMapper:
    """Opens an image as RGB, transforms it, and returns a dict with "image" (3, H, W) uint8 and "label".

    With ``two_views`` there is a second view of the same image, "image_key", from another draw of the transform.
    """

    def __init__(self, transform: Optional[Transform] = None, two_views: bool = False) -> None:
        """
        Args:
            transform: of a PIL image, such as a ``Compose`` of torchvision's; it must give images of one size. None for
                images that are in memory and have it already.
            two_views: for MoCo.
        """
        self._transform, self._two_views = transform, two_views

    def __call__(self, entry: Dict[str, Any]) -> Dict[str, Any]:
        """Map an entry: "image", (H, W) or (H, W, 3) uint8, or else "file_name"; and "label".

        Raises:
            UserError: the file is no image.
        """
        result = {key: entry[key] for key in ("label", "file_name") if key in entry}
        if self._transform is None and not self._two_views and "image" in entry:  # without a detour over PIL
            return {**result, "image": _rgb(entry["image"])}
        image, transform = _opened(entry), self._transform or _unchanged
        result["image"] = pil_to_tensor(transform(image))
        if self._two_views:
            result["image_key"] = pil_to_tensor(transform(image))
        return result


def _rgb(image: np.ndarray) -> torch.Tensor:
    """Return (3, H, W) of (H, W) or (H, W, 3)."""
    tensor = torch.as_tensor(image)
    return tensor.expand(3, -1, -1) if tensor.dim() == 2 else tensor.permute(2, 0, 1)


def _unchanged(image: Image.Image) -> Image.Image:
    return image


def _opened(entry: Dict[str, Any]) -> Image.Image:
    if "image" in entry:
        return Image.fromarray(np.asarray(entry["image"])).convert("RGB")
    try:
        with Image.open(entry["file_name"]) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as e:
        raise UserError(f"the image {entry['file_name']} cannot be read: {e}. Repair it, or take it out") from e
