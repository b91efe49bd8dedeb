"""Builders of the student backbones, alone and under Detectron2's FPN, by name in BACKBONE_REGISTRY."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from mgd_det.errors import UserError
from mgd_det.modeling.backbone.mobilenet import MobileNetV2

__all__ = [
    "build_mobilenetv2_backbone",
    "build_mobilenetv2_fpn_backbone",
    "build_retinanet_mobilenetv2_fpn_backbone",
]


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """MobileNetV2 alone, with the features of MODEL.MOBILENETS.OUT_FEATURES."""
    return MobileNetV2(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 and FPN for the R-CNN family: p6 is p5 subsampled."""
    return _build_fpn(cfg, MobileNetV2(cfg, input_shape), "MODEL.MOBILENETS.OUT_FEATURES")


@BACKBONE_REGISTRY.register()
def build_retinanet_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 and FPN for RetinaNet and FCOS: p6 and p7 are convolved from res5."""
    return _build_fpn(cfg, MobileNetV2(cfg, input_shape), "MODEL.MOBILENETS.OUT_FEATURES", p6p7=True)


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, out_features_key: str, p6p7: bool = False) -> FPN:
    """Puts the FPN of MODEL.FPN on a bottom-up network.

    Args:
        cfg: the config of the detector.
        bottom_up: network that returns at least the features of MODEL.FPN.IN_FEATURES.
        out_features_key: config key that says which features the network returns, for error messages.
        p6p7: add p6 and p7, convolved from res5 (RetinaNet); otherwise p6, subsampled from p5 (R-CNN).

    Returns:
        The backbone, from the level of the first of IN_FEATURES ("res3" gives p3) to p6 or p7.

    Raises:
        UserError: IN_FEATURES lists what the network does not return, leaves a gap, or does not end in
            res5.
    """
    in_features = list(cfg.MODEL.FPN.IN_FEATURES)
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    shapes = bottom_up.output_shape()
    _check_in_features(in_features, list(shapes), out_features_key)
    top_block = LastLevelP6P7(shapes["res5"].channels, out_channels) if p6p7 else LastLevelMaxPool()
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=out_channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _check_in_features(in_features: list, available: list, out_features_key: str) -> None:
    missing = [name for name in in_features if name not in available]
    if missing:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {in_features}, but the bottom-up network does not return "
            f"{', '.join(missing)}. Add {'it' if len(missing) == 1 else 'them'} to {out_features_key}, "
            f"which is {available}, or take {'it' if len(missing) == 1 else 'them'} out of "
            "MODEL.FPN.IN_FEATURES."
        )
    # Detectron2's extra levels are made from res5 or p5 by name, and numbered from the last input on: with
    # another last input they would get a wrong stride or fail in the first forward pass.
    stages = ["res2", "res3", "res4", "res5"]
    if not in_features or in_features != stages[-len(in_features) :]:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {in_features}. It must list neighbouring stages from shallow to deep "
            'and end in "res5", for example ["res3", "res4", "res5"].'
        )
