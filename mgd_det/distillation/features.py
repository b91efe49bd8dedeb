"""The features inside a backbone that a distillation position can read, and their names."""

from dataclasses import dataclass, replace
from typing import Dict, Optional

from detectron2.modeling.backbone import FPN, Backbone, ResNet
from torch import nn


@dataclass(frozen=True)
class FeatureSpec:
    """Where one feature map is found in a backbone.

    Attributes:
        module: dotted path, inside the backbone, of the module that makes the feature.
        before_activation: True reads the input of the last activation that the module runs;
            False reads the module's output.
        norm: dotted path of the last norm layer before the feature, whose weight and bias give the
            margin; None if there is none.
    """

    module: str
    before_activation: bool
    norm: Optional[str] = None


def distillation_features(backbone: Backbone) -> Dict[str, FeatureSpec]:
    """Return the features that a backbone offers, by name, from shallow to deep.

    A network declares them by a method ``distillation_features()``; Detectron2's :class:`ResNet` and :class:`FPN` are
    known here. The names are the stages' ("res2".."res5"), with a suffix where a stage offers more than its output
    ("res2.expansion"). An FPN offers those of its bottom-up network and its own levels ("p3"..). A level is the output
    of its last convolution. A level that is subsampled from another ("p6" of the R-CNNs) is not offered.
    """
    if hasattr(backbone, "distillation_features"):
        return backbone.distillation_features()
    if isinstance(backbone, ResNet):
        return _resnet_features(backbone)
    if isinstance(backbone, FPN):
        stages = distillation_features(backbone.bottom_up)
        return {**{name: _within("bottom_up", spec) for name, spec in stages.items()}, **_fpn_features(backbone)}
    return {}


def _within(path: str, spec: FeatureSpec) -> FeatureSpec:
    norm = None if spec.norm is None else f"{path}.{spec.norm}"
    return replace(spec, module=f"{path}.{spec.module}", norm=norm)


def _fpn_features(fpn: FPN) -> Dict[str, FeatureSpec]:
    features, modules = {}, dict(fpn.named_modules(remove_duplicate=False))
    for name in fpn.output_shape():
        for path in (f"fpn_output{name[1:]}", f"top_block.{name}"):
            if path in modules:
                features[name] = FeatureSpec(path, before_activation=False, norm=_norm_path(fpn, path))
    return features


def _resnet_features(resnet: ResNet) -> Dict[str, FeatureSpec]:
    features = {}
    for name, stage in zip(resnet.stage_names, resnet.stages):
        path = f"{name}.{len(stage) - 1}"
        # The residual branch ends in conv3 (bottleneck) or conv2 (basic block).
        last_conv = "conv3" if hasattr(stage[-1], "conv3") else "conv2"
        norm = _norm_path(resnet, f"{path}.{last_conv}")
        features[name] = FeatureSpec(path, before_activation=True, norm=norm)
    return features


def _norm_path(network: nn.Module, convolution: str) -> Optional[str]:
    """Return the path of the norm layer that a convolution of Detectron2 owns, or None."""
    norm = getattr(network.get_submodule(convolution), "norm", None)
    return f"{convolution}.norm" if isinstance(norm, nn.Module) else None
