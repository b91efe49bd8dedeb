"""torchvision's detectors with a ResNet and FPN: their backbone, for Detectron2's ResNet and FPN.

The heads are left out, because torchvision's and Detectron2's differ in anchors and in the order of classes.

Pixels and stride are as in :mod:`mgd_det.checkpoint.torchvision_weights`. RetinaNet has p3 to p7, the R-CNN family
p2 to p6. ``retinanet_resnet50_fpn`` and ``fcos_resnet50_fpn`` convolve p6 from p5, ``retinanet_resnet50_fpn_v2`` from
res5 as Detectron2's "build_retinanet_resnet_fpn_backbone" does. The ``_v2`` ones of the R-CNN family have batch norm
in the FPN: ``MODEL.FPN.NORM: "BN"``.
"""

import logging
import re
from typing import AbstractSet, Dict, Optional, Sequence

from torch import Tensor

from mgd_det.checkpoint.torchvision_weights import rename_resnet
from mgd_det.checkpoint.weights_format import NORM, WeightsFormat

_BODY = "backbone.body."
# Files from before torchvision 0.13 lack the ".0" of the convolution.
_FPN_CONV = re.compile(r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)(?:\.0)?\.(weight|bias)")
_FPN_NORM = re.compile(rf"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.1\.({NORM})")
_TOP_BLOCK = re.compile(r"backbone\.fpn\.extra_blocks\.(p[67]\.(?:weight|bias))")
_DETECTRON2_NAMES = {"inner": "fpn_lateral", "layer": "fpn_output"}

# Of Detectron2's FrozenBatchNorm2d and of torch's batch norms.
_EPS = 1e-5

logger = logging.getLogger(__name__)


def _rename(names: Sequence[str], model_names: AbstractSet[str]) -> Optional[Dict[str, str]]:
    body = rename_resnet([name[len(_BODY) :] for name in names if name.startswith(_BODY)])
    if body is None:
        return None
    renamed = {_BODY + name: new for name, new in body.items()}
    # The last is of res5 (level 5) in all of them; the first of res3 in a RetinaNet, of res2 in an R-CNN.
    last = max((int(match.group(2)) for match in map(_FPN_CONV.fullmatch, names) if match), default=0)
    for name in names:
        conv, norm, top_block = (pattern.fullmatch(name) for pattern in (_FPN_CONV, _FPN_NORM, _TOP_BLOCK))
        if conv:
            kind, index, tensor = conv.groups()
            renamed[name] = f"{_DETECTRON2_NAMES[kind]}{5 - last + int(index)}.{tensor}"
        elif norm:
            kind, index, tensor = norm.groups()
            renamed[name] = f"{_DETECTRON2_NAMES[kind]}{5 - last + int(index)}.norm.{tensor}"
        elif top_block:
            renamed[name] = f"top_block.{top_block.group(1)}"
    return renamed


def _fold_eps(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Compensate for the eps of 0 in the norm layers of the older detectors.

    torchvision's FrozenBatchNorm2d once ignored eps, and weights trained with it (COCO_V1 of RetinaNet, Faster, Mask
    and Keypoint R-CNN) still run with eps 0 (``torchvision.models.detection._utils.overwrite_eps``). Detectron2's
    layers add 1e-5 to the variance. Subtracting it here gives the same features and leaves weight and bias, which the
    margins of distillation come from, as they are. A tiny variance may become negative, but not its sum with eps.

    Such a file has no num_batches_tracked, which a trained batch norm has. A detector that someone trained from
    ImageNet weights has frozen norms with an eps of 1e-5 and looks the same; for it, this is an error of 1e-5 in the
    variance.
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
