"""Student backbones. Importing this package puts their builders (see ``fpn``) into BACKBONE_REGISTRY."""

import mgd_det.modeling.backbone.fpn  # noqa: F401  registers the builders
from mgd_det.modeling.backbone.mobilenet import MobileNetV1, MobileNetV2, MobileNetV3Large, MobileNetV3Small
from mgd_det.modeling.backbone.norms import Norm
from mgd_det.modeling.backbone.shufflenet import ShuffleNetV2
from mgd_det.modeling.backbone.staged_backbone import Stage, StagedBackbone
from mgd_det.modeling.backbone.timm_backbone import TimmBackbone

__all__ = [
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNetV3Small",
    "Norm",
    "ShuffleNetV2",
    "Stage",
    "StagedBackbone",
    "TimmBackbone",
]
