"""Distillation of a dense detector's head (RetinaNet, FCOS).

Shape shorthand: B images, A anchors of a place, K classes, R = B * all anchors of an image.
"""

from contextlib import nullcontext
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes
from torch import nn

from mgd_det.distillation import Teacher, sigmoid_logit_loss, weighted_giou_loss
from mgd_det.errors import ArgumentError
from mgd_det.modeling.head_distillation.compatibility import check_classes, check_heads, check_kind
from mgd_det.modeling.head_distillation.cross_heads import CrossHeads
from mgd_det.modeling.head_distillation.options import HeadOptions
from mgd_det.modeling.head_distillation.precision import in_float32
from mgd_det.modeling.head_distillation.record import CurrentRecord, HeadRecord

Features = Dict[str, torch.Tensor]


class DenseHeads:
    """Compares what two dense detectors predict at every anchor.

    ``loss_kd_logits``: the classes, by :func:`sigmoid_logit_loss`. ``loss_kd_boxes``: the boxes, weighted by the
    teacher's highest class score, by :func:`weighted_giou_loss`. ``loss_kd_cross_cls`` and ``loss_kd_cross_boxes``: of
    :class:`CrossHeads`. FCOS's centre-ness is not distilled.
    """

    def __init__(self, teacher: Teacher, options: HeadOptions) -> None:
        """
        Args:
            teacher: its whole detector, a DenseDetector.
            options: what to distil.

        Raises:
            ArgumentError: masks are to be distilled.
        """
        if options.masks is not None:
            raise ArgumentError(
                "masks.weight",
                f"is {options.masks.weight}, but the teacher, a {type(teacher.detector).__name__}, predicts no masks: "
                "set it to 0, or give a Mask R-CNN",
            )
        self._teacher, self._options = teacher, options
        self._cross = None if options.cross_kd is None else CrossHeads(options.cross_kd)

    def attach(self, student: nn.Module, record: CurrentRecord) -> None:
        """Record the head's predictions in training forwards of ``student``.

        Raises:
            UserError: it is of another kind than the teacher, or has other classes, anchors or (CrossKD) widths.
        """
        teacher: Any = self._teacher.detector
        on = self._options.on
        check_kind(isinstance(student, type(teacher)) or isinstance(teacher, type(student)), on, student, teacher)
        assert isinstance(student, DenseDetector)
        check_classes(student.num_classes, teacher.num_classes, on)
        check_heads(
            _have_same_anchors(student.anchor_generator, teacher.anchor_generator),
            on,
            "but teacher and student have different anchors, so that their predictions cannot be compared",
            "give them the same MODEL.ANCHOR_GENERATOR and levels",
        )
        if self._cross is not None:
            self._cross.attach(student.head, teacher.head, record)
        self._record = record
        student.head.register_forward_hook(self._keep)

    def _keep(self, head: nn.Module, args: Any, output: Any) -> None:
        record = self._record()
        if record is not None:
            record.logits, record.deltas = output[:2]

    def losses(self, student: Any, features: Features, record: HeadRecord, progress: float) -> Features:
        """Compute the losses; see :meth:`HeadDistillation.losses`."""
        teacher: Any = self._teacher.detector
        levels = [features[name] for name in teacher.head_in_features]
        of_logits, of_boxes, crossing = self._options.logits, self._options.boxes, self._options.cross_kd
        reading: Any = nullcontext() if self._cross is None else self._cross.reading(teacher.head)
        with torch.no_grad(), in_float32(teacher.head.bbox_pred), reading as tower_features:
            logits, deltas = teacher.head(levels)[:2]
        losses: Features = {}
        if of_logits is not None:
            loss = sigmoid_logit_loss(_flat(record.logits), _flat(logits), of_logits.temperature, of_logits.focal_gamma)
            losses["loss_kd_logits"] = of_logits.weighted(loss, progress)
        if of_boxes is not None or (crossing is not None and crossing.box_weight > 0):
            anchors = Boxes.cat(teacher.anchor_generator(levels)).tensor.repeat(len(levels[0]), 1)
            scores = _by_anchor(logits, teacher.num_classes).float().amax(dim=1).sigmoid()
            boxes = _decoded(teacher, deltas, anchors)
        if of_boxes is not None:
            loss = weighted_giou_loss(_decoded(student, record.deltas, anchors), boxes, scores)
            losses["loss_kd_boxes"] = of_boxes.weighted(loss, progress)
        if self._cross is not None and crossing is not None:
            # Of the detector's own losses: a running mean of the number of positive anchors.
            normalizer: Optional[float] = getattr(student, "loss_normalizer", None)
            with in_float32(teacher.head.bbox_pred):
                crossed_logits, crossed_deltas = self._cross.predictions(teacher.head, record, tower_features)
            loss = sigmoid_logit_loss(_flat(crossed_logits), _flat(logits), gamma=1.0, normalizer=normalizer)
            losses["loss_kd_cross_cls"] = crossing.weighted(loss, progress)
            if crossing.box_weight > 0:
                loss = weighted_giou_loss(_decoded(teacher, crossed_deltas, anchors), boxes, scores, normalizer)
                losses["loss_kd_cross_boxes"] = crossing.weighted(crossing.box_weight * loss, progress)
        return losses


def _have_same_anchors(one: Any, other: Any) -> bool:
    # Equal boxes at another stride are other anchors: levels p2 to p6 beside p3 to p7.
    anchors, strides = ([list(getattr(x, name, ())) for x in (one, other)] for name in ("cell_anchors", "strides"))
    same_levels = strides[0] == strides[1] and len(anchors[0]) == len(anchors[1])
    return same_levels and all(a.shape == b.shape and torch.allclose(a, b.to(a), rtol=1e-3) for a, b in zip(*anchors))


def _flat(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([level.flatten() for level in levels])


def _by_anchor(levels: Sequence[torch.Tensor], values: int) -> torch.Tensor:
    """Return (R, values) of (B, A * values, H, W) of each level."""
    by_image: List[torch.Tensor] = [permute_to_N_HWA_K(level, values) for level in levels]
    return torch.cat(by_image, dim=1).flatten(0, 1)


def _decoded(detector: Any, deltas: Sequence[torch.Tensor], anchors: torch.Tensor) -> torch.Tensor:
    """Return the boxes (R, 4) of a detector's deltas in float32."""
    boxes: torch.Tensor = detector.box2box_transform.apply_deltas(_by_anchor(deltas, 4).float(), anchors)
    return boxes
