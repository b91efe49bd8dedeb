"""Teachers with random weights for the configs of the model zoo: their own are downloads, or results of a training."""

import functools
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import head_loss_keys
from mgd_det.distillation import TeacherNetwork
from mgd_det.modeling import build_teacher, teacher_config


def random_teacher(cfg: CfgNode) -> TeacherNetwork:
    """Build what ``build_teacher`` builds, with random weights."""
    mgd = cfg.MODEL.MGD
    return _teacher(mgd.TEACHER.CONFIG_FILE, tuple(mgd.TEACHER.OPTS), bool(head_loss_keys(cfg)))


@functools.lru_cache(maxsize=3)  # many configs in a row have the same teacher
def _teacher(config_file: str, opts: tuple, whole_detector: bool) -> TeacherNetwork:
    cfg = read_config("")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MGD.TEACHER.CONFIG_FILE, cfg.MODEL.MGD.TEACHER.OPTS = config_file, list(opts)
    cfg.MODEL.MGD.LOGITS.WEIGHT = float(whole_detector)
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "teacher.pth")
        cfg.MODEL.MGD.TEACHER.WEIGHTS = weights
        torch.save({"model": build_model(teacher_config(cfg)).state_dict()}, weights)
        return build_teacher(cfg)
