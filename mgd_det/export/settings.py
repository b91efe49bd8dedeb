"""What an exported detector needs in addition to its network, as a dict for the json in the model's metadata."""

from typing import Any, Dict, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.modeling.meta_arch import fcos, retinanet
from torch import nn

from mgd_det.errors import UserError
from mgd_det.export.postprocessing import VERSION


def detector_settings(
    cfg: CfgNode,
    detector: Any,
    classes: Sequence[str],
    category_ids: Optional[Sequence[int]] = None,
    whole: bool = False,
) -> Dict[str, Any]:
    """Describe a detector for :mod:`mgd_det.export.postprocessing`.

    Args:
        cfg: the detector's config.
        detector: built from it.
        classes: the names of its classes.
        category_ids: their ids in the data set; 1, 2, 3... by default.
        whole: whether the exported model has the post-processing inside.

    Raises:
        UserError: the core of this detector cannot be exported.
    """
    settings = {
        "version": VERSION,
        "kind": "whole" if whole else core_kind(detector),
        "detector": cfg.MODEL.META_ARCHITECTURE,
        "classes": list(classes),
        "category_ids": list(category_ids or range(1, len(classes) + 1)),
        "channel_order": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "size_divisibility": max(detector.backbone.size_divisibility, 1),
    }
    require_rgb_or_bgr(cfg)
    if detector.backbone.padding_constraints.get("square_size"):
        raise UserError(f"{cfg.MODEL.BACKBONE.NAME} takes squares only: such a detector cannot be exported")
    return settings if whole else {**settings, **_core_settings(detector)}


def require_rgb_or_bgr(cfg: CfgNode) -> None:
    """Check the order of an image's channels.

    Raises:
        UserError: the detector takes others than RGB or BGR.
    """
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: only RGB and BGR can be exported or predicted with")


def core_kind(detector: nn.Module) -> str:
    """Return "retinanet" or "fcos".

    Raises:
        UserError: the detector is neither.
    """
    for kind, base in (("retinanet", retinanet.RetinaNet), ("fcos", fcos.FCOS)):
        if isinstance(detector, base):
            return kind
    raise UserError(
        f"{type(detector).__name__} cannot be exported without its post-processing, only RetinaNet and FCOS can: "
        "give --with-nms (with --format onnx, and without --int8)"
    )


def core_outputs(detector: Any) -> List[str]:
    """Return the names of the outputs of a detector's core: "logits_p3", "logits_p4", ... "deltas_p3", ..."""
    parts = ["logits", "deltas"] + ["centerness"] * (core_kind(detector) == "fcos")
    return [f"{part}_{level}" for part in parts for level in detector.head_in_features]


def _core_settings(detector: Any) -> Dict[str, Any]:
    transform = detector.box2box_transform
    boxes = {}
    if core_kind(detector) == "retinanet":
        boxes = {"box_weights": list(transform.weights), "scale_clamp": transform.scale_clamp}
    elif not transform.normalize_by_size:
        raise UserError("an FCOS whose boxes are not in units of the stride cannot be exported without --with-nms")
    return {
        "outputs": core_outputs(detector),
        "pixel_mean": detector.pixel_mean.flatten().tolist(),
        "pixel_std": detector.pixel_std.flatten().tolist(),
        "score_threshold": detector.test_score_thresh,
        "nms_threshold": detector.test_nms_thresh,
        "candidates_per_level": detector.test_topk_candidates,
        "max_detections": detector.max_detections_per_image,
        "strides": list(detector.anchor_generator.strides),
        "anchor_offset": detector.anchor_generator.offset,
        "cell_anchors": [anchors.tolist() for anchors in detector.anchor_generator.cell_anchors],
        **boxes,
    }
