"""Building the teacher that a config names."""

import logging
from typing import Any

import detectron2.model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import Backbone, build_backbone
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.config import merge_config, without_distillation
from mgd_det.distillation import PixelFormat, Teacher
from mgd_det.errors import UserError
from mgd_det.model_zoo import find_config_file, is_detectron2_zoo_config

logger = logging.getLogger(__name__)


def build_teacher(cfg: CfgNode) -> Teacher:
    """The frozen teacher of ``MODEL.MGD.TEACHER``, with its weights, on the CPU.

    Raises UserError where the config or the weights are not there, or leave a parameter unset.
    """
    teacher_cfg = teacher_config(cfg)
    pixels = PixelFormat.from_config(teacher_cfg)
    return pretrained_teacher(build_backbone(teacher_cfg), teacher_cfg.MODEL.WEIGHTS, pixels)


def pretrained_teacher(backbone: Backbone, weights: str, pixels: PixelFormat) -> Teacher:
    """The frozen teacher of a backbone and the weights of a detector that has it: for LazyConfig, without a cfg.

    Args:
        weights: path or URL of the detector's checkpoint.
        pixels: the input that the detector was trained with.

    Raises UserError as :func:`build_teacher`.
    """
    _load_weights(backbone, weights)
    return Teacher(backbone, pixels=pixels)


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The config of the plain detector that ``MODEL.MGD.TEACHER`` describes, with MODEL.WEIGHTS of the teacher."""
    teacher = cfg.MODEL.MGD.TEACHER
    name = teacher.CONFIG_FILE
    if not name:
        raise UserError(
            "MODEL.MGD.TEACHER.CONFIG_FILE is empty: name the teacher's config, a path or a name in Detectron2's "
            "model zoo such as COCO-Detection/retinanet_R_50_FPN_1x.yaml"
        )
    path = find_config_file(name, "MODEL.MGD.TEACHER.CONFIG_FILE")
    teacher_cfg = merge_config(path, teacher.OPTS, f"{name} of MODEL.MGD.TEACHER")
    teacher_cfg = without_distillation(teacher_cfg)
    teacher_cfg.MODEL.WEIGHTS = teacher.WEIGHTS or _weights_of(name, teacher_cfg)
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    return teacher_cfg


def _weights_of(name: str, teacher_cfg: CfgNode) -> str:
    if not is_detectron2_zoo_config(name):
        return teacher_cfg.MODEL.WEIGHTS
    try:
        return detectron2.model_zoo.get_checkpoint_url(name)
    except RuntimeError as e:
        raise UserError(
            f"Detectron2's model zoo has no trained weights for {name}: set MODEL.MGD.TEACHER.WEIGHTS"
        ) from e


def _load_weights(backbone: Backbone, weights: str) -> None:
    # A teacher that is partly random teaches noise, so that a tensor left unset is an error.
    if not weights:
        raise UserError(
            "MODEL.MGD.TEACHER.WEIGHTS is empty and the teacher's config names no weights: "
            "give the checkpoint of the trained teacher"
        )
    detector = nn.Module()
    detector.backbone = backbone
    checkpointer = _BackboneCheckpointer(detector)
    checkpointer.load(weights)
    prefix = "backbone.bottom_up." if hasattr(backbone, "bottom_up") else "backbone."
    unset = [key for key in checkpointer.unset_keys if key.startswith(prefix)]
    if unset:
        raise UserError(
            f"the teacher's weights {weights} leave {len(unset)} of its backbone's tensors unset "
            f"({', '.join(unset[:3])}{', ...' if len(unset) > 3 else ''}): they are of another network. "
            "Check MODEL.MGD.TEACHER.CONFIG_FILE, OPTS and WEIGHTS."
        )
    logger.info(f"The teacher's backbone has its weights from {weights}")


class _BackboneCheckpointer(WeightsCheckpointer):
    """Loads the backbone of a whole detector, so that unused keys are no news."""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        pass
