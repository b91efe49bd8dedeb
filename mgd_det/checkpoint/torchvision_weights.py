"""torchvision's classification networks as the start of a detector's backbone.

They were trained on RGB images scaled to 0..1, so a detector that starts from them needs ``INPUT.FORMAT: "RGB"``,
``MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53]`` and ``MODEL.PIXEL_STD: [58.395, 57.12, 57.375]``. A ResNet also needs
``MODEL.RESNETS.STRIDE_IN_1X1: False``, because torchvision's has its stride in the 3x3 convolution.

A ResNet gets the names of :class:`detectron2.modeling.ResNet`. The others keep their names, which this project's
students share. The classifier is left out.
"""

import re
from typing import AbstractSet, Dict, Optional, Pattern, Sequence

from mgd_det.checkpoint.weights_format import NORM, Rename, WeightsFormat, all_fit

_RESNET = re.compile(
    r"conv1\.weight|fc\.(?:weight|bias)"
    rf"|bn1\.{NORM}"
    rf"|layer[1-4]\.\d+\.(?:conv[123]\.weight|bn[123]\.{NORM}|downsample\.0\.weight|downsample\.1\.{NORM})"
)
_MOBILENETV2 = re.compile(
    r"classifier\.1\.(?:weight|bias)"
    rf"|features\.\d+\.(?:0\.weight|1\.{NORM})"
    rf"|features\.\d+\.conv\.(?:[01]\.0\.weight|[01]\.1\.{NORM}|[12]\.weight|[23]\.{NORM})"
)
_MOBILENETV3 = re.compile(
    r"classifier\.[03]\.(?:weight|bias)"
    rf"|features\.\d+\.(?:0\.weight|1\.{NORM})"
    rf"|features\.\d+\.block\.\d\.(?:0\.weight|1\.{NORM}|fc[12]\.(?:weight|bias))"
)
_SHUFFLENETV2 = re.compile(
    r"fc\.(?:weight|bias)"
    rf"|conv[15]\.(?:0\.weight|1\.{NORM})"
    rf"|stage[234]\.\d+\.branch[12]\.\d\.{NORM}"
)


def rename_resnet(names: Sequence[str], model_names: AbstractSet[str] = frozenset()) -> Optional[Dict[str, str]]:
    """Rename a torchvision ResNet to Detectron2's names: "layer1.0.downsample.1.bias" is "res2.0.shortcut.norm.bias".

    See :class:`WeightsFormat` for arguments and result.
    """
    if not all_fit(names, _RESNET, {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"}):
        return None
    return {name: "bottom_up." + _resnet_name(name) for name in names if not name.startswith("fc.")}


def _resnet_name(name: str) -> str:
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match.group(1)) + 1}", name)
    name = name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")
    return re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)


def _kept(pattern: Pattern[str], required: AbstractSet[str]) -> Rename:
    """Return the renaming of a network that keeps its names."""

    def rename(names: Sequence[str], model_names: AbstractSet[str]) -> Optional[Dict[str, str]]:
        if not all_fit(names, pattern, required):
            return None
        return {name: f"bottom_up.{name}" for name in names if not name.startswith(("classifier.", "fc."))}

    return rename


RESNET = WeightsFormat("a ResNet of torchvision or timm", rename_resnet)
MOBILENETV2 = WeightsFormat(
    "a MobileNetV2 of torchvision", _kept(_MOBILENETV2, {"features.0.0.weight", "features.1.conv.0.0.weight"})
)
MOBILENETV3 = WeightsFormat(
    "a MobileNetV3 of torchvision", _kept(_MOBILENETV3, {"features.0.0.weight", "features.1.block.0.0.weight"})
)
SHUFFLENETV2 = WeightsFormat(
    "a ShuffleNetV2 of torchvision", _kept(_SHUFFLENETV2, {"conv1.0.weight", "stage2.0.branch1.0.weight"})
)
