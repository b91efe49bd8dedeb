"""Builders of the student backbones, alone and with Detectron2's FPN, by name in BACKBONE_REGISTRY.

For each student of ``_STUDENTS``, "mobilenetv2" for instance:

- ``build_mobilenetv2_backbone``: the network alone, with the features of its OUT_FEATURES;
- ``build_mobilenetv2_fpn_backbone``: with FPN for the R-CNN family, p2 to p6; p6 is p5 subsampled;
- ``build_retinanet_mobilenetv2_fpn_backbone``: with FPN for RetinaNet, p3 to p7; p6 and p7 are convolved from res5;
- ``build_fcos_mobilenetv2_fpn_backbone``: with FPN for FCOS, p3 to p7; p6 and p7 are convolved from p5.

Each of the FPNs has a light variant, whose 3 x 3 convolutions are separable: ``_separable_fpn_`` in place of ``_fpn_``
in its name. ``build_fcos_resnet_fpn_backbone`` and the light variants complete Detectron2's builders for its ResNet.
"""

import itertools
from typing import Any, Callable, Dict, List, Type

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
from mgd_det.modeling.light import SeparableFPN

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


def _build_fpn(
    cfg: CfgNode, bottom_up: Backbone, out_features_key: str, top_block: _TopBlock, fpn_class: Type[FPN]
) -> FPN:
    """Build the FPN of MODEL.FPN on a bottom-up network, from the first of IN_FEATURES ("res3" gives p3) to p6 or p7.

    Args:
        out_features_key: config key that says which features the network returns, for error messages.
        top_block: makes the levels above p5, from the channels of res5 and those of the FPN.
        fpn_class: FPN or SeparableFPN.

    Raises:
        UserError: IN_FEATURES lists what the network does not return, leaves a gap, or does not end in res5.
    """
    in_features = list(cfg.MODEL.FPN.IN_FEATURES)
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    shapes = bottom_up.output_shape()
    _check_in_features(in_features, list(shapes), out_features_key)
    return fpn_class(
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


def _register(name: str, doc: str, build: Callable[[CfgNode, ShapeSpec], Backbone]) -> None:
    """Register ``build_<name>_backbone``, and make it a function of this module, so that it can be pickled."""
    build.__name__ = build.__qualname__ = f"build_{name}_backbone"
    build.__doc__ = doc
    BACKBONE_REGISTRY.register(build)
    globals()[build.__name__] = build


def _register_alone(student: str, network: Type[StagedBackbone]) -> None:
    def build(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        return network(cfg, input_shape)

    _register(student, f"{network.__name__} alone, with the features of {network.config_key}.OUT_FEATURES.", build)


def _register_fpn(
    name: str, network: Callable[..., Any], doc: str, key: str, top_block: _TopBlock, light: bool
) -> None:
    fpn_class = SeparableFPN if light else FPN

    def build(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        return _build_fpn(cfg, network(cfg, input_shape), key, top_block, fpn_class)

    _register(f"{name}_separable_fpn" if light else f"{name}_fpn", doc, build)


# By the prefix of the builder's name: the levels above p5, and what they are for.
_TOP_BLOCKS = {
    "": (_max_pool, "FPN for the R-CNN family: p6 is p5 subsampled."),
    "retinanet_": (_p6p7_from_res5, "FPN for RetinaNet: p6 and p7 from res5."),
    "fcos_": (_p6p7_from_p5, "FPN for FCOS: p6 and p7 from p5."),
}


def _register_fpns(student: str, network: Callable[..., Any], title: str, key: str) -> None:
    for (prefix, (top_block, kind)), light in itertools.product(_TOP_BLOCKS.items(), (False, True)):
        name = f"{prefix}{student}"
        # Detectron2 has its own for its ResNet.
        if light or f"build_{name}_fpn_backbone" not in BACKBONE_REGISTRY:
            doc = f"{title} and {'light ' if light else ''}{kind}"
            _register_fpn(name, network, doc, key, top_block, light)


for _student, _network in _STUDENTS.items():
    _register_alone(_student, _network)
    _register_fpns(_student, _network, _network.__name__, f"{_network.config_key}.OUT_FEATURES")
_register_fpns("resnet", build_resnet_backbone, "Detectron2's ResNet", "MODEL.RESNETS.OUT_FEATURES")
