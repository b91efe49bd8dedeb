"""The config keys that this project adds to Detectron2's, with their defaults."""

from detectron2.config import CfgNode as CN

from mgd_det.config_keys.detectors import add_fcos_keys, add_student_keys
from mgd_det.config_keys.distillation import add_distillation_keys
from mgd_det.config_keys.training import add_data_keys, add_report_keys, add_solver_keys, add_test_keys


def add_mgd_config(cfg: CN) -> None:
    """Add the keys of this project to ``cfg``: distillation (MODEL.MGD), students, FCOS, data and training."""
    add_student_keys(cfg)
    add_fcos_keys(cfg)
    add_data_keys(cfg)
    add_solver_keys(cfg)
    add_test_keys(cfg)
    add_report_keys(cfg)
    add_distillation_keys(cfg)
    # Keys of version 0.1 without effect today. Old config.yaml files still load, with a warning.
    for key in ("MODEL.MGD.COMPILE_STUDENT", "MODEL.MGD.TEACHER.OWN_STREAM"):
        cfg.register_deprecated_key(key)
