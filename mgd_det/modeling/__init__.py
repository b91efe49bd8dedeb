"""Networks. Importing this package fills Detectron2's registries."""

from mgd_det.modeling.backbone import (
    MGDBackbone,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
    ShuffleNetV2,
    attach_losses,
)
from mgd_det.modeling.teacher import build_teacher, pretrained_teacher, teacher_config

__all__ = [
    "MGDBackbone",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNetV3Small",
    "ShuffleNetV2",
    "attach_losses",
    "build_teacher",
    "pretrained_teacher",
    "teacher_config",
]
