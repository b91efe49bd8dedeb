"""The config keys that this project adds to Detectron2's."""

from typing import Any, Sequence

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from mgd_det.errors import UserError

# MODEL.BACKBONE.NAME of a config with distillation.
MGD_BACKBONE = "build_mgd_backbone"


def add_mgd_config(cfg: CN) -> None:
    """Adds to ``cfg`` the keys of distillation (MODEL.MGD) and of the student backbones."""
    _add_student_config(cfg)

    # -------------------------------------------------------------------- distillation
    # Used where MODEL.BACKBONE.NAME is MGD_BACKBONE.
    cfg.MODEL.MGD = CN()
    # Name in BACKBONE_REGISTRY of the student's backbone, which build_mgd_backbone wraps.
    cfg.MODEL.MGD.STUDENT_BACKBONE = "build_retinanet_resnet_fpn_backbone"
    # Features to distil, shallow to deep, by the name both nets give them ("res2".."res5"), or
    # "<student's>=<teacher's>" where the names differ ("res2.expansion=res2").
    cfg.MODEL.MGD.POSITIONS = ["res2", "res3", "res4", "res5"]
    # How the teacher's channels of a group become one: "amp" (absolute max pooling), "rd" (random
    # drop) or "sm" (sparse matching: one teacher channel for each student channel).
    cfg.MODEL.MGD.REDUCER = "amp"
    # Where the margin of a teacher channel comes from: "norm" (weight and bias of its last norm
    # layer), "measured" (mean of its negative values while the matching is measured), or "auto"
    # ("norm", but "measured" where there is no norm layer or its statistics were folded away).
    cfg.MODEL.MGD.MARGIN = "auto"
    # Norm layer of the student's features in the loss, used in training only: "GN", "BN", "SyncBN"
    # or another name of detectron2.layers.get_norm; "" for none.
    cfg.MODEL.MGD.NORM = "GN"
    # Groups of "GN"; where a position's channels are no multiple, their greatest common divisor.
    cfg.MODEL.MGD.NORM_GROUPS = 32

    cfg.MODEL.MGD.LOSS = CN()
    # Weight of each position's loss, in the order of POSITIONS; a single number serves them all. >= 0.
    cfg.MODEL.MGD.LOSS.WEIGHTS = [3.0]
    # What the squared error of a position is divided by: "mean" (B*C*H*W), "target" (B*C*H*W and the
    # mean square of the target, measured once, on the last batch of the first matching) or "authors" (the
    # factors of the authors' Detectron2 code, as they act on its 8 GPUs, whatever the batch or the number
    # of GPUs is here).
    cfg.MODEL.MGD.LOSS.SCALE = "target"

    cfg.MODEL.MGD.TEACHER = CN()
    # The teacher's config: a path, or a name in Detectron2's or this project's model zoo.
    cfg.MODEL.MGD.TEACHER.CONFIG_FILE = ""
    # The teacher's weights: path or URL; "" for those that the model zoo has for CONFIG_FILE, or else
    # MODEL.WEIGHTS of that config.
    cfg.MODEL.MGD.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: a list KEY, VALUE, KEY, VALUE...
    cfg.MODEL.MGD.TEACHER.OPTS = []

    cfg.MODEL.MGD.MATCHING = CN()
    # Iterations between two updates of the matching; > 0. PERIODS[i] holds from iteration
    # MILESTONES[i - 1] on, so there is one period more than milestones. The first matching is always
    # solved before training.
    cfg.MODEL.MGD.MATCHING.PERIODS = [5000, 31000]
    cfg.MODEL.MGD.MATCHING.MILESTONES = [20000]
    # Batches of SOLVER.IMS_PER_BATCH images that an update measures the cost on; > 0.
    cfg.MODEL.MGD.MATCHING.NUM_BATCHES = 1000


def merge_config(path: str, opts: Sequence[Any], name: str = "") -> CN:
    """Detectron2's and this project's defaults, with a yaml file ("" for none) and overrides merged.

    Args:
        opts: KEY, VALUE, KEY, VALUE...
        name: what the user calls the file, for the error.

    Raises UserError for a file or an override that does not fit.
    """
    cfg = get_cfg()
    add_mgd_config(cfg)
    try:
        if path:
            cfg.merge_from_file(path)
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, TypeError, AssertionError, OSError, yaml.YAMLError) as e:
        overrides = f" with {list(opts)}" if opts else ""
        raise UserError(f"config {name or path or '(defaults)'}{overrides}: {e}") from e
    return cfg


def without_distillation(cfg: CN) -> CN:
    """A copy of ``cfg`` that builds the plain student; of a config without distillation, a plain copy."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE:
        cfg.MODEL.BACKBONE.NAME = cfg.MODEL.MGD.STUDENT_BACKBONE
    return cfg


def _add_student_config(cfg: CN) -> None:
    # --------------------------------------------------------------- MobileNet students
    cfg.MODEL.MOBILENETS = CN()
    # Norm layers: "FrozenBN", "BN", "SyncBN" or "GN".
    cfg.MODEL.MOBILENETS.NORM = "FrozenBN"
    # Multiplier of every layer's channels; 1.0 gives 24/32/96/320 at res2..res5. > 0.
    cfg.MODEL.MOBILENETS.WIDTH_MULT = 1.0
    # Features that the backbone returns, of "res2".."res5".
    cfg.MODEL.MOBILENETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
