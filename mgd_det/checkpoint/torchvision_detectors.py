"""The backbones of torchvision's detectors, for Detectron2's ResNet and FPN.

The heads are left out: torchvision's and Detectron2's differ in anchors and in the order of classes.

Pixels and stride are as in :mod:`mgd_det.checkpoint.torchvision_weights`. RetinaNet has p3 to p7, the R-CNN family
p2 to p6. ``retinanet_resnet50_fpn`` and ``fcos_resnet50_fpn`` compute p6 from p5; ``retinanet_resnet50_fpn_v2``
computes it from res5, as Detectron2's "build_retinanet_resnet_fpn_backbone" does. The R-CNNs ending in ``_v2`` have
batch norm in the FPN: they need ``MODEL.FPN.NORM: "BN"``.
"""

import logging
import re
from typing import AbstractSet, Dict, Optional, Sequence

from torch import Tensor

from mgd_det.checkpoint.torchvision_weights import rename_resnet
from mgd_det.checkpoint.weights_format import NORM, WeightsFormat

_BODY = "backbone.body."
# A block is a convolution (".0", which torchvision < 0.13 left out) and a norm layer (".1").
_FPN = re.compile(rf"backbone\.fpn\.(inner|layer)_blocks\.(\d+)(?:(?:\.0)?\.(weight|bias)|\.1\.({NORM}))")
_TOP_BLOCK = re.compile(r"backbone\.fpn\.extra_blocks\.(p[67]\.(?:weight|bias))")
_DETECTRON2_NAMES = {"inner": "fpn_lateral", "layer": "fpn_output"}

# The eps of Detectron2's FrozenBatchNorm2d and of torch's batch norms.
_EPS = 1e-5

logger = logging.getLogger(__name__)


def _rename(names: Sequence[str], model_names: AbstractSet[str]) -> Optional[Dict[str, str]]:
    body = rename_resnet([name[len(_BODY) :] for name in names if name.startswith(_BODY)])
    if body is None:
        return None
    renamed = {_BODY + name: new for name, new in body.items()}
    fpn = {name: match.groups() for name in names if (match := _FPN.fullmatch(name))}
    # The last block is of res5 (level 5); the first is of res3 in a RetinaNet, of res2 in an R-CNN.
    last = max((int(index) for _, index, _, _ in fpn.values()), default=0)
    for name, (kind, index, conv, norm) in fpn.items():
        renamed[name] = f"{_DETECTRON2_NAMES[kind]}{5 - last + int(index)}.{conv or f'norm.{norm}'}"
    top_block = {name: f"top_block.{match.group(1)}" for name in names if (match := _TOP_BLOCK.fullmatch(name))}
    return {**renamed, **top_block}


def _fold_eps(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Compensate for the eps of 0 in the norm layers of the older detectors.

    torchvision's FrozenBatchNorm2d once ignored eps, and weights trained with it (COCO_V1 of RetinaNet, Faster, Mask
    and Keypoint R-CNN) still run with eps 0 (``torchvision.models.detection._utils.overwrite_eps``). Detectron2's
    layers add 1e-5 to the variance, so it is subtracted here. Weight and bias, which the margins of distillation come
    from, stay the same. A tiny variance may become negative, but not its sum with eps.

    Such a file has no num_batches_tracked; a trained batch norm has one. A detector that someone trained from
    ImageNet weights looks the same but has an eps of 1e-5. For it, the variance is wrong by 1e-5.
    """
    counts = any(name.startswith(_BODY) and name.endswith("num_batches_tracked") for name in tensors)
    is_fcos = any(name.startswith("head.regression_head.bbox_ctrness.") for name in tensors)  # newer than the fix
    if counts or is_fcos:
        return tensors
    logger.info("The detector's frozen batch norms had an eps of 0: 1e-5 is subtracted from their variances.")
    return {
        name: value - _EPS if name.startswith(_BODY) and name.endswith("running_var") else value
        for name, value in tensors.items()
    }


DETECTOR = WeightsFormat("a detector of torchvision with a ResNet and FPN", _rename, _fold_eps)
