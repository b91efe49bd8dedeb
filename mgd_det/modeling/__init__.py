"""Networks. Importing this package fills Detectron2's registries."""

from mgd_det.modeling import light  # noqa: F401  (its parts are in the registries, and in it by name)
from mgd_det.modeling.backbone import (
    MobileNetV1,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
    ShuffleNetV2,
    TimmBackbone,
)
from mgd_det.modeling.inheritance import InheritanceReport, inherit
from mgd_det.modeling.injection import Distillation, attach_losses, find_distillation
from mgd_det.modeling.meta_arch import FCOS
from mgd_det.modeling.mgd_backbone import build_mgd_backbone, distilled_backbone
from mgd_det.modeling.modes import evaluating, unwrapped
from mgd_det.modeling.narrowing import Narrowed, NarrowingOptions, narrow
from mgd_det.modeling.teacher_inheritance import check_inheritance, inherit_from_config, inherit_from_teacher
from mgd_det.modeling.teachers import build_teacher, named_teacher, pretrained_teacher, teacher_config

__all__ = [
    "Distillation",
    "FCOS",
    "InheritanceReport",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNetV3Small",
    "Narrowed",
    "NarrowingOptions",
    "ShuffleNetV2",
    "TimmBackbone",
    "attach_losses",
    "build_mgd_backbone",
    "build_teacher",
    "check_inheritance",
    "distilled_backbone",
    "evaluating",
    "find_distillation",
    "inherit",
    "inherit_from_config",
    "inherit_from_teacher",
    "named_teacher",
    "narrow",
    "pretrained_teacher",
    "teacher_config",
    "unwrapped",
]
