"""Networks. Importing this package fills Detectron2's registries."""

from mgd_det.modeling.backbone import (
    MobileNetV1,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
    ShuffleNetV2,
    TimmBackbone,
)
from mgd_det.modeling.injection import MGDBackbone, attach_losses
from mgd_det.modeling.meta_arch import FCOS
from mgd_det.modeling.teacher_builder import build_teacher, named_teacher, pretrained_teacher, teacher_config

__all__ = [
    "FCOS",
    "MGDBackbone",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNetV3Small",
    "ShuffleNetV2",
    "TimmBackbone",
    "attach_losses",
    "build_teacher",
    "named_teacher",
    "pretrained_teacher",
    "teacher_config",
]
