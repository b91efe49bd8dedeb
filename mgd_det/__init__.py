"""Matching Guided Distillation (Yue, Deng, Zhou, ECCV 2020) for Detectron2 detectors."""

import importlib.util
import warnings

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "mgd_det extends Detectron2, which is not installed in this Python environment. Run "
        "`make install` in a checkout of mgd_det, or follow Detectron2's own instructions: "
        "https://detectron2.readthedocs.io/tutorials/install.html"
    )

from mgd_det.detectron2_warnings import ignore_detectron2_warnings  # noqa: E402

with warnings.catch_warnings():
    ignore_detectron2_warnings()
    from mgd_det import data, modeling  # noqa: F401  (fill Detectron2's registries)

from mgd_det.config import add_mgd_config  # noqa: E402

__version__ = "0.1.0"
__all__ = ["add_mgd_config"]
