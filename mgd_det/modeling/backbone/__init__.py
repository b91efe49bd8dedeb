"""Student backbones. Importing this package puts their builders into BACKBONE_REGISTRY."""

from mgd_det.modeling.backbone.fpn import (
    build_mobilenetv2_backbone,
    build_mobilenetv2_fpn_backbone,
    build_retinanet_mobilenetv2_fpn_backbone,
)
from mgd_det.modeling.backbone.mgd import (
    MGDBackbone,
    attach_losses,
    build_mgd_backbone,
    evaluating,
    find_mgd_backbone,
    unwrapped,
)
from mgd_det.modeling.backbone.mobilenet import MobileNetV2

__all__ = [
    "MGDBackbone",
    "MobileNetV2",
    "attach_losses",
    "build_mgd_backbone",
    "build_mobilenetv2_backbone",
    "build_mobilenetv2_fpn_backbone",
    "build_retinanet_mobilenetv2_fpn_backbone",
    "evaluating",
    "find_mgd_backbone",
    "unwrapped",
]
