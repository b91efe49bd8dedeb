"""Networks. Importing this package fills Detectron2's registries."""

from mgd_det.modeling.backbone import MGDBackbone, MobileNetV2, attach_losses
from mgd_det.modeling.teacher import build_teacher, pretrained_teacher, teacher_config

__all__ = ["MGDBackbone", "MobileNetV2", "attach_losses", "build_teacher", "pretrained_teacher", "teacher_config"]
