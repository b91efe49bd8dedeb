"""timm's classification networks as the start of a detector's backbone.

timm's ``pretrained_cfg`` gives the mean and standard deviation of the RGB images (scaled to 0..1) that a network was
trained on. Most have ImageNet's, as torchvision's networks do. Some have 0.5: ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD``
are then [127.5, 127.5, 127.5].
"""

import re
from typing import AbstractSet, Dict, Optional, Sequence

from mgd_det.checkpoint.weights_format import NORM, WeightsFormat, all_fit

_MOBILENETV1 = re.compile(
    rf"conv_stem\.weight|bn1\.{NORM}|classifier\.(?:weight|bias)"
    rf"|blocks\.(\d+)\.(\d+)\.(conv_dw|bn1|conv_pw|bn2)\.({NORM})"
)
_MOBILENETV1_LAYERS = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1.0", "bn2": "1.1"}


def _rename_mobilenetv1(names: Sequence[str], model_names: AbstractSet[str]) -> Optional[Dict[str, str]]:
    """Number the blocks of all stages in one sequence: "blocks.0.0.conv_dw.weight" is "features.1.0.0.weight"."""
    if not all_fit(names, _MOBILENETV1, {"conv_stem.weight", "blocks.0.0.conv_dw.weight", "blocks.0.0.conv_pw.weight"}):
        return None
    matches = {name: _MOBILENETV1.fullmatch(name) for name in names}
    blocks = sorted({(int(m.group(1)), int(m.group(2))) for m in matches.values() if m and m.group(1)})
    renamed = {}
    for name, match in matches.items():
        if match and match.group(1):
            stage, block, layer, tensor = match.groups()
            number = 1 + blocks.index((int(stage), int(block)))
            renamed[name] = f"bottom_up.features.{number}.{_MOBILENETV1_LAYERS[layer]}.{tensor}"
        elif not name.startswith("classifier."):
            renamed[name] = "bottom_up.features.0." + name.replace("conv_stem.", "0.").replace("bn1.", "1.")
    return renamed


def _rename_for_timm_backbone(names: Sequence[str], model_names: AbstractSet[str]) -> Optional[Dict[str, str]]:
    """Rename the tensors of any timm network for the timm model inside TimmBackbone.

    A ``features_only`` model of timm keeps the network's names, or puts "model." or "body." before them. If the
    stages come from an ``nn.Sequential``, it joins the first two parts: "stages.0.blocks.0.gamma" becomes
    "stages_0.blocks.0.gamma".
    """
    renamed = {}
    fits = False
    for name in names:
        renamed[name] = f"bottom_up.body.{name}"
        for variant in (name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}"):
            if f"bottom_up.body.{variant}" in model_names:
                renamed[name] = f"bottom_up.body.{variant}"
                fits = True
    return renamed if fits else None


MOBILENETV1 = WeightsFormat("a MobileNetV1 of timm", _rename_mobilenetv1)
TIMM = WeightsFormat("a network of timm", _rename_for_timm_backbone)
