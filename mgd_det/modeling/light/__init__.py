"""Parts for light detectors. Importing this package puts them into Detectron2's registries."""

from mgd_det.modeling.light.detectors import (
    SeparableConvFCHead,
    SeparableFCOS,
    SeparableFCOSHead,
    SeparableFPN,
    SeparableMaskHead,
    SeparableRetinaNet,
    SeparableRetinaNetHead,
    SeparableRPNHead,
)
from mgd_det.modeling.light.separable_conv import SeparableConv2d, make_separable, separable_from

__all__ = [
    "SeparableConv2d",
    "SeparableConvFCHead",
    "SeparableFCOS",
    "SeparableFCOSHead",
    "SeparableFPN",
    "SeparableMaskHead",
    "SeparableRPNHead",
    "SeparableRetinaNet",
    "SeparableRetinaNetHead",
    "make_separable",
    "separable_from",
]
