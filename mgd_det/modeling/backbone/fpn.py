"""Builders of the student backbones, alone and with Detectron2's FPN, by name in BACKBONE_REGISTRY.

For each student of ``_STUDENTS``, "mobilenetv2" for instance:

- ``build_mobilenetv2_backbone``: the network alone, with the features of its OUT_FEATURES;
- ``build_mobilenetv2_fpn_backbone``: with FPN for the R-CNN family, p2 to p6; p6 is p5 subsampled;
- ``build_retinanet_mobilenetv2_fpn_backbone``: with FPN for RetinaNet, p3 to p7; p6 and p7 are convolved from res5;
- ``build_fcos_mobilenetv2_fpn_backbone``: with FPN for FCOS, p3 to p7; p6 and p7 are convolved from p5.

``build_fcos_resnet_fpn_backbone`` completes Detectron2's builders for its ResNet.
"""

from typing import Any, Callable, Dict, List, Optional, Type

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from mgd_det.errors import UserError
from mgd_det.modeling.backbone.mobilenet import MobileNetV1, MobileNetV2, MobileNetV3Large, MobileNetV3Small
from mgd_det.modeling.backbone.shufflenet import ShuffleNetV2
from mgd_det.modeling.backbone.staged_backbone import StagedBackbone
from mgd_det.modeling.backbone.timm_backbone import TimmBackbone

# By their part of the builders' names.
_STUDENTS: Dict[str, Type[StagedBackbone]] = {
    "mobilenetv1": MobileNetV1,
    "mobilenetv2": MobileNetV2,
    "mobilenetv3_large": MobileNetV3Large,
    "mobilenetv3_small": MobileNetV3Small,
    "shufflenetv2": ShuffleNetV2,
    "timm": TimmBackbone,
}


def _max_pool(res5_channels: int, out_channels: int) -> nn.Module:
    return LastLevelMaxPool()


def _p6p7_from_res5(res5_channels: int, out_channels: int) -> nn.Module:
    return LastLevelP6P7(res5_channels, out_channels)


def _p6p7_from_p5(res5_channels: int, out_channels: int) -> nn.Module:
    # Section 2.2 of the FCOS paper's journal version (arXiv:2006.09214).
    return LastLevelP6P7(out_channels, out_channels, in_feature="p5")


_TopBlock = Callable[[int, int], nn.Module]


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, out_features_key: str, top_block: _TopBlock) -> FPN:
    """Build the FPN of MODEL.FPN on a bottom-up network, from the first of IN_FEATURES ("res3" gives p3) to p6 or p7.

    Args:
        out_features_key: config key that says which features the network returns, for error messages.
        top_block: makes the levels above p5, from the channels of res5 and those of the FPN.

    Raises:
        UserError: IN_FEATURES lists what the network does not return, leaves a gap, or does not end in res5.
    """
    in_features = list(cfg.MODEL.FPN.IN_FEATURES)
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    shapes = bottom_up.output_shape()
    _check_in_features(in_features, list(shapes), out_features_key)
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=out_channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(shapes["res5"].channels, out_channels),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _check_in_features(in_features: List[str], available: List[str], out_features_key: str) -> None:
    missing = [name for name in in_features if name not in available]
    if missing:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {in_features}, but the bottom-up network does not return "
            f"{', '.join(missing)}; add these to {out_features_key}, which is {available}, or remove them from "
            "MODEL.FPN.IN_FEATURES"
        )
    # Detectron2 makes the extra levels from res5 or p5 by name and numbers them after the last input: with another
    # last input their stride would be wrong, or the first forward would fail.
    stages = ["res2", "res3", "res4", "res5"]
    if not in_features or in_features != stages[-len(in_features) :]:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {in_features}; give neighbouring stages from shallow to deep that end in "
            '"res5", for example ["res3", "res4", "res5"]'
        )


def _register(name: str, network: Callable[..., Any], doc: str, key: str, top_block: Optional[_TopBlock]) -> None:
    """Register ``build_<name>_backbone``, and make it a function of this module, so that it can be pickled."""

    def build(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        bottom_up = network(cfg, input_shape)
        return bottom_up if top_block is None else _build_fpn(cfg, bottom_up, key, top_block)

    build.__name__ = build.__qualname__ = f"build_{name}_backbone"
    build.__doc__ = doc
    BACKBONE_REGISTRY.register(build)
    globals()[build.__name__] = build


def _register_students() -> None:
    for student, network in _STUDENTS.items():
        title, key = network.__name__, f"{network.config_key}.OUT_FEATURES"
        for name, top_block, doc in (
            (student, None, f"{title} alone, with the features of {key}."),
            (f"{student}_fpn", _max_pool, f"{title} and FPN for the R-CNN family: p6 is p5 subsampled."),
            (f"retinanet_{student}_fpn", _p6p7_from_res5, f"{title} and FPN for RetinaNet: p6 and p7 from res5."),
            (f"fcos_{student}_fpn", _p6p7_from_p5, f"{title} and FPN for FCOS: p6 and p7 from p5."),
        ):
            _register(name, network, doc, key, top_block)


_register_students()
_register(
    "fcos_resnet_fpn",
    build_resnet_backbone,
    "Detectron2's ResNet and FPN for FCOS: p6 and p7 from p5.",
    "MODEL.RESNETS.OUT_FEATURES",
    _p6p7_from_p5,
)
