"""Distillation of what the heads predict: the teacher's heads beside the student's.

- ``options``: what is distilled, and how strongly.
- ``record``: what the student's forward leaves for the losses.
- ``precision``: what computes in float32 under autocast.
- ``compatibility``: which detectors can be compared.
- ``dense_heads``: RetinaNet and FCOS; ``cross_heads``: the student's features in the teacher's head.
- ``roi_heads``: box and mask heads of the R-CNNs.
- ``losses_of_heads``: chooses between them, or takes what a teacher of another kind brings.
"""

from mgd_det.modeling.head_distillation.compatibility import check_classes, check_kind
from mgd_det.modeling.head_distillation.losses_of_heads import HeadDistillation
from mgd_det.modeling.head_distillation.options import HeadOptions, is_on
from mgd_det.modeling.head_distillation.record import CurrentRecord, HeadRecord

__all__ = ["CurrentRecord", "HeadDistillation", "HeadOptions", "HeadRecord", "check_classes", "check_kind", "is_on"]
