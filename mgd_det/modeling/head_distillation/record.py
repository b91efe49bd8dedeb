"""What one training forward of the student leaves for the losses of its heads."""

from dataclasses import dataclass, field
from typing import Any, Callable, List, Optional

import torch


@dataclass
class HeadRecord:
    """Predictions of the student's heads, with their graph.

    Attributes:
        logits: of each level of a dense detector, (B, A * K, H, W); or of each stage of a box head, (R, K + 1).
        deltas: the box deltas beside them: (B, A * 4, H, W), or (R, 4) or (R, 4 * K).
        boxes: the proposals of each stage of a box head: for each image, Boxes.
        mask_instances: the foreground proposals of a mask head: for each image, Instances.
        mask_logits: of the mask head, (N, K or 1, M, M), in a list; empty until it has run.
        class_features: CrossKD's features of a dense head's tower of classes, (B, C, H, W) of each level.
        box_features: the same of the tower of boxes.
    """

    logits: List[torch.Tensor] = field(default_factory=list)
    deltas: List[torch.Tensor] = field(default_factory=list)
    boxes: List[Any] = field(default_factory=list)
    mask_instances: List[Any] = field(default_factory=list)
    mask_logits: List[torch.Tensor] = field(default_factory=list)
    class_features: List[torch.Tensor] = field(default_factory=list)
    box_features: List[torch.Tensor] = field(default_factory=list)


# Returns the record of the forward in progress, or None if nothing is to be recorded.
CurrentRecord = Callable[[], Optional[HeadRecord]]
