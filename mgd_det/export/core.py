"""The core of a dense detector, from the normalised image to raw outputs: what torch.export takes.

Shape shorthand in this module: B images, A anchors at each cell, K classes, H and W pixels or cells.
"""

from typing import Any, Tuple

import torch
from torch import Tensor, nn

from mgd_det.export.settings import core_kind

# Sides of the traced image at which the last of five levels has more than one cell, over the size divisibility of 32.
_TRACED_SIDES = (8, 10)


class DenseCore(nn.Module):
    """Backbone, FPN and head of a RetinaNet or an FCOS, in eval mode."""

    def __init__(self, detector: Any) -> None:
        """
        Args:
            detector: it stays as it is, and shares its modules.

        Raises:
            UserError: it is of another kind.
        """
        super().__init__()
        core_kind(detector)
        self.backbone, self.head = detector.backbone, detector.head
        self.in_features = list(detector.head_in_features)

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Compute the raw outputs.

        Args:
            images: (B, 3, H, W), normalised and padded to multiples of the size divisibility.

        Returns:
            (B, A * K, H, W) logits of each level, then (B, A * 4, H, W) deltas, then FCOS's (B, 1, H, W) centerness.
        """
        features = self.backbone(images)
        parts = self.head([features[name] for name in self.in_features])
        return tuple(output for part in parts for output in part)


def traced_core(detector: Any) -> torch.export.ExportedProgram:
    """Trace the core of a detector for any batch, height and width, these two in steps of the size divisibility."""
    step = max(detector.backbone.size_divisibility, 1)
    images = torch.zeros(2, 3, *(side * step for side in _TRACED_SIDES), device=detector.device)
    dim = torch.export.Dim
    sizes = {0: dim("batch"), 2: step * dim("height"), 3: step * dim("width")}
    with torch.no_grad():
        return torch.export.export(DenseCore(detector).eval(), (images,), dynamic_shapes={"images": sizes})
