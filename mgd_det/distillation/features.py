"""Names of the features inside a backbone that a distillation position can read."""

from dataclasses import dataclass
from typing import Dict, Optional

from detectron2.modeling.backbone import Backbone, ResNet
from torch import nn


@dataclass(frozen=True)
class FeatureSpec:
    """Where one feature map is found in a backbone.

    Attributes:
        module: dotted path, inside the backbone, of the module that makes the feature.
        before_activation: True reads the input of the last ReLU (or ReLU6) that the module runs;
            False reads the module's output.
        norm: dotted path of the last norm layer before the feature, whose weight and bias give the
            margin; None where there is none.
    """

    module: str
    before_activation: bool
    norm: Optional[str] = None


def distillation_features(bottom_up: Backbone) -> Dict[str, FeatureSpec]:
    """The features that a bottom-up network offers, by name, from shallow to deep.

    A backbone says so itself by a method ``distillation_features()``, as those of this project do;
    Detectron2's :class:`ResNet` is known here. Names are the stages' ("res2".."res5"), with a suffix
    where a stage offers more than its output ("res2.expansion").
    """
    if hasattr(bottom_up, "distillation_features"):
        return bottom_up.distillation_features()
    if isinstance(bottom_up, ResNet):
        return _resnet_features(bottom_up)
    return {}


def _resnet_features(resnet: ResNet) -> Dict[str, FeatureSpec]:
    features = {}
    for name, stage in zip(resnet.stage_names, resnet.stages):
        block = stage[-1]
        # The residual branch ends in conv3 (bottleneck) or conv2 (basic block); the norm layer, if any, is its child.
        last_conv = "conv3" if hasattr(block, "conv3") else "conv2"
        path = f"{name}.{len(stage) - 1}"
        has_norm = isinstance(getattr(getattr(block, last_conv), "norm", None), nn.Module)
        features[name] = FeatureSpec(
            module=path,
            before_activation=True,
            norm=f"{path}.{last_conv}.norm" if has_norm else None,
        )
    return features
