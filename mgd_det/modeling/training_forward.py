"""What one training forward of the student's detector passes from hook to hook."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch

from mgd_det.distillation import Padding
from mgd_det.modeling.head_distillation import HeadRecord

Features = Dict[str, torch.Tensor]
Batch = List[Dict[str, Any]]


@dataclass
class TrainingForward:
    """State of one forward of the detector, from its first hook to its last.

    Attributes:
        image_sizes: (height, width) of each image.
        is_measured: whether it is for the matching, which needs the backbone's images only.
        distils: False in a step that the schedule leaves out.
        inputs: Detectron2's training inputs.
        images: (B, C, H, W), those of a measured forward, once the backbone has got them.
        padding: of the images, once the backbone has got them.
        teacher_features: by name, (B, Ct, H, W).
        teacher_outputs: of the teacher's backbone, by name; empty if nothing needs them.
        reading: reads the student's features while the backbone runs.
        student_features: by name, (B, Cs, H, W).
        losses: of the positions; None until the backbone has run.
        heads: what the student's heads leave for their losses.
    """

    image_sizes: List[Tuple[int, int]]
    is_measured: bool
    distils: bool = True
    inputs: Batch = field(default_factory=list)
    images: Optional[torch.Tensor] = None
    padding: Optional[Padding] = None
    teacher_features: Features = field(default_factory=dict)
    teacher_outputs: Features = field(default_factory=dict)
    reading: Optional[AbstractContextManager] = None
    student_features: Features = field(default_factory=dict)
    losses: Optional[Features] = None
    heads: HeadRecord = field(default_factory=HeadRecord)
