"""The light preset for a teacher's kind of detector: what of its FPN and heads a light student has lighter."""

from typing import Any, Dict

import yaml
from detectron2.config import CfgNode

from mgd_det.config import detector_kind
from mgd_det.model_zoo import get_config_file

_PRESETS = {"RetinaNet": "RetinaNet", "FCOS": "FCOS", "GeneralizedRCNN": "RCNN"}
_WIDTH = "MODEL.FPN.OUT_CHANNELS"
_WIDTH_STEP = 32  # group norm has as many groups
_NORMS = {"RetinaNet": "MODEL.RETINANET.NORM", "FCOS": "MODEL.FCOS.NORM"}  # of the towers, as wide as the FPN


def light_settings(teacher_cfg: CfgNode) -> Dict[str, Any]:
    """Return keys and values of the light preset (configs/Base-Light-*.yaml) for a student of the teacher's kind.

    No number is above the teacher's: a teacher whose head has one convolution has a student with one. The width of the
    FPN is half the teacher's in steps of 32, at least 32, and that of the preset at most. Towers of 32 channels have
    "LN" in place of "GN", whose groups would have one channel each.

    Args:
        teacher_cfg: of a RetinaNet, an FCOS or an R-CNN with an FPN.
    """
    with open(get_config_file(f"Base-Light-{_PRESETS[detector_kind(teacher_cfg)]}.yaml"), encoding="utf-8") as file:
        model = yaml.safe_load(file)["MODEL"]
    theirs = teacher_cfg.MODEL
    if not theirs.MASK_ON:
        model.pop("ROI_MASK_HEAD", None)
    found: Dict[str, Any] = {}
    for name, value in model.items():
        if not isinstance(value, dict):
            found[f"MODEL.{name}"] = value
            continue
        for key, light in value.items():
            found[f"MODEL.{name}.{key}"] = min(light, theirs[name][key]) if isinstance(light, int) else light
    found[_WIDTH] = min(found[_WIDTH], max(theirs.FPN.OUT_CHANNELS // 2 // _WIDTH_STEP * _WIDTH_STEP, _WIDTH_STEP))
    norm = _NORMS.get(detector_kind(teacher_cfg))
    if norm and found[_WIDTH] == _WIDTH_STEP and theirs[norm.split(".")[1]].NORM == "GN":
        found[norm] = "LN"
    if found.get("MODEL.ROI_MASK_HEAD.NUM_CONV") == 0:
        del found["MODEL.ROI_MASK_HEAD.NAME"]  # it has nothing to make separable
    if detector_kind(teacher_cfg) == "GeneralizedRCNN" and theirs.ROI_BOX_HEAD.NUM_CONV > 0:
        found["MODEL.ROI_BOX_HEAD.NAME"] = "SeparableConvFCHead"
    return found
