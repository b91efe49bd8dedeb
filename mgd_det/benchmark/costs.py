"""What one image costs a detector: parameters, multiply-adds, and the function whose time counts."""

from typing import Any

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_MASKS = 100  # objects of an image


class NetworkRun:
    """Runs the network of a RetinaNet, an FCOS or an R-CNN on one image of noise: all but the dense ones' final NMS.

    An R-CNN has the number of proposals of its config. Its weights may be random, so it finds nothing here: score
    thresholds are set to 1, and the heads of masks and keypoints get 100 boxes of their own. Call it to run it.
    """

    def __init__(self, detector: Any, height: int, width: int) -> None:
        """
        Args:
            detector: in eval mode, on the CPU; for this only, because its score thresholds change.
            height, width: of the image, in pixels.
        """
        self._detector = detector
        for module in detector.modules():
            if hasattr(module, "test_score_thresh"):
                module.test_score_thresh = 1.0
        noise = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0))
        self._images: ImageList = detector.preprocess_image([{"image": noise.to(torch.uint8)}])
        self._objects = [_boxes_in(height, width)]

    @torch.no_grad()
    def __call__(self) -> None:
        detector = self._detector
        features = detector.backbone(self._images.tensor)
        if hasattr(detector, "head"):
            detector.head([features[name] for name in detector.head_in_features])
            return
        proposals, _ = detector.proposal_generator(self._images, features, None)
        detector.roi_heads(self._images, features, proposals, None)
        detector.roi_heads.forward_with_given_boxes(features, self._objects)

    def multiply_adds(self) -> int:
        """Count the multiply-adds of convolutions and matrix products, which torch counts as two operations each."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops() // 2


def parameters_of(detector: nn.Module) -> int:
    """Return the number of a detector's parameters."""
    return sum(parameter.numel() for parameter in detector.parameters())


def _boxes_in(height: int, width: int) -> Instances:
    """Return 100 objects of a tenth to a half of the image, of class 0."""
    generator = torch.Generator().manual_seed(0)
    sizes = 0.1 + 0.4 * torch.rand(_MASKS, 2, generator=generator)
    corners = (1 - sizes) * torch.rand(_MASKS, 2, generator=generator)
    scale = torch.tensor([width, height, width, height])
    objects = Instances((height, width))
    objects.pred_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1) * scale)
    objects.pred_classes = torch.zeros(_MASKS, dtype=torch.long)
    return objects
