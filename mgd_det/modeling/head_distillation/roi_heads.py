"""Distillation of the box and mask heads of the R-CNNs.

Shape shorthand: R proposals, K classes, N foreground proposals, M the side of a mask.
"""

from typing import Any, Dict, List, Tuple

import torch
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import nn

from mgd_det.distillation import Teacher, bernoulli_logit_loss, softmax_logit_loss, weighted_giou_loss
from mgd_det.errors import ArgumentError
from mgd_det.modeling.head_distillation.compatibility import check_classes, check_heads, check_kind
from mgd_det.modeling.head_distillation.options import HeadLossOptions, HeadOptions
from mgd_det.modeling.head_distillation.precision import in_float32
from mgd_det.modeling.head_distillation.record import CurrentRecord, HeadRecord

Features = Dict[str, torch.Tensor]


class RoIHeads:
    """Compares what the heads of two R-CNNs predict for the student's own sampled proposals.

    ``loss_kd_logits``: the classes, by :func:`softmax_logit_loss`. ``loss_kd_boxes``: the boxes of the teacher's best
    class, weighted by its score, by :func:`weighted_giou_loss`. Both: of a cascade, the sum over its stages, as its own
    losses are; Detectron2 divides what their gradient adds to the features by the number of stages.
    ``loss_kd_masks``: the masks of the foreground proposals, of their ground-truth class, by
    :func:`bernoulli_logit_loss`. The RPN and keypoints are not distilled.
    """

    def __init__(self, teacher: Teacher, options: HeadOptions) -> None:
        """
        Args:
            teacher: its whole detector, with StandardROIHeads.
            options: what to distil.

        Raises:
            ArgumentError: CrossKD is on.
        """
        if options.cross_kd is not None:
            raise ArgumentError(
                "cross_kd.weight",
                f"is {options.cross_kd.weight}, but the teacher, a {type(teacher.detector).__name__}, is not a "
                "RetinaNet or FCOS: set it to 0, or give such a detector",
            )
        self._teacher, self._options = teacher, options
        self._of_boxes: List[HeadLossOptions] = [o for o in (options.logits, options.boxes) if o is not None]

    def attach(self, student: nn.Module, record: CurrentRecord) -> None:
        """Record proposals and predictions in training forwards of ``student``.

        Raises:
            UserError: its heads are of another kind than the teacher's, or have other classes.
        """
        teacher: Any = self._teacher.detector
        heads: Any = getattr(student, "roi_heads", None)
        on = self._options.on
        check_kind(isinstance(heads, StandardROIHeads), on, student, teacher)
        check_classes(heads.num_classes, teacher.roi_heads.num_classes, on)
        self._record = record
        if self._of_boxes:
            self._attach_boxes(heads, teacher.roi_heads)
        if self._options.masks is not None:
            self._attach_masks(heads, teacher.roi_heads)

    def _attach_boxes(self, heads: Any, teacher: Any) -> None:
        on, stages = self._of_boxes, _stages(heads)
        check_kind(len(stages) == len(_stages(teacher)), on, heads, teacher)
        for _, predictor in [*stages, *_stages(teacher)]:
            problem = "but MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is set, whose logits are not distilled"
            check_heads(not getattr(predictor, "use_sigmoid_ce", False), on, problem, "turn it off")
            if self._options.boxes is not None:
                problem = "but a box head predicts rotated boxes"
                check_heads(
                    len(predictor.box2box_transform.weights) == 4, [self._options.boxes], problem, "use upright boxes"
                )
        heads.box_pooler.register_forward_pre_hook(self._keep_boxes)
        for _, predictor in stages:
            predictor.register_forward_hook(self._keep_predictions)

    def _attach_masks(self, heads: Any, teacher: Any) -> None:
        assert self._options.masks is not None
        for name, own in (("student", heads), ("teacher", teacher)):
            head = getattr(own, "mask_head", None)
            is_known = isinstance(head, MaskRCNNConvUpsampleHead) and own.mask_pooler is not None
            kind = "no mask head" if head is None else f"a {type(head).__name__}"
            problem = f"but the {name} has {kind}, not a MaskRCNNConvUpsampleHead with a pooler"
            check_heads(is_known, [self._options.masks], problem, "set MODEL.MASK_ON of both")
        sides = [own.mask_pooler.output_size for own in (heads, teacher)]
        check_heads(
            sides[0] == sides[1],
            [self._options.masks],
            f"but the student's MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is {sides[0][0]} and the teacher's {sides[1][0]}",
            "make them equal",
        )
        heads.mask_head.register_forward_pre_hook(self._keep_mask_instances)
        heads.mask_head.predictor.register_forward_hook(self._keep_mask_logits)

    # ------------------------------------------------------------------ hooks on the student's heads
    def _keep_boxes(self, pooler: nn.Module, args: Any) -> None:
        record = self._record()
        if record is not None:
            record.boxes.append(args[1])

    def _keep_predictions(self, predictor: nn.Module, args: Any, output: Any) -> None:
        record = self._record()
        if record is not None:
            record.logits.append(output[0])
            record.deltas.append(output[1])

    def _keep_mask_instances(self, head: nn.Module, args: Any) -> None:
        record = self._record()
        if record is not None:
            record.mask_instances = args[1]

    def _keep_mask_logits(self, predictor: nn.Module, args: Any, output: Any) -> None:
        record = self._record()
        if record is not None:
            record.mask_logits.append(output)

    # ------------------------------------------------------------------ losses
    def losses(self, student: Any, features: Features, record: HeadRecord, progress: float) -> Features:
        """Compute the losses; see :meth:`HeadDistillation.losses`."""
        teacher: Any = self._teacher.detector
        options, losses = self._options, {}
        if self._of_boxes:
            predictions = _box_predictions(teacher.roi_heads, features, record)
        if options.logits is not None:
            of_stages = [
                softmax_logit_loss(own, theirs, options.logits.temperature)
                for own, (theirs, _) in zip(record.logits, predictions)
            ]
            losses["loss_kd_logits"] = options.logits.weighted(torch.stack(of_stages).sum(), progress)
        if options.boxes is not None:
            stages = zip(_stages(student.roi_heads), _stages(teacher.roi_heads), record.deltas, record.boxes)
            of_stages = [
                _box_loss(deltas, own.box2box_transform, prediction, theirs.box2box_transform, boxes)
                for ((_, own), (_, theirs), deltas, boxes), prediction in zip(stages, predictions)
            ]
            losses["loss_kd_boxes"] = options.boxes.weighted(torch.stack(of_stages).sum(), progress)
        if options.masks is not None:
            losses["loss_kd_masks"] = options.masks.weighted(_mask_loss(teacher.roi_heads, features, record), progress)
        return losses


def _stages(heads: Any) -> List[Tuple[nn.Module, Any]]:
    """Return (box head, predictor) of each stage; a cascade has several."""
    if isinstance(heads.box_predictor, nn.ModuleList):
        return list(zip(heads.box_head, heads.box_predictor))
    return [(heads.box_head, heads.box_predictor)]


@torch.no_grad()
def _box_predictions(heads: Any, features: Features, record: HeadRecord) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    """Return the teacher's logits and deltas of the student's proposals, for each stage."""
    levels, stages = [features[name] for name in heads.box_in_features], _stages(heads)
    with in_float32(*(predictor for _, predictor in stages)):
        return [
            predictor(head(heads.box_pooler(levels, boxes))) for boxes, (head, predictor) in zip(record.boxes, stages)
        ]


def _box_loss(
    deltas: torch.Tensor, transform: Any, teacher: Any, teacher_transform: Any, proposals: Any
) -> torch.Tensor:
    """Compute the loss of one stage; ``teacher``: its (R, K + 1) logits and its deltas."""
    boxes = torch.cat([of_image.tensor for of_image in proposals])
    logits, teacher_deltas = teacher
    scores, classes = logits.float().softmax(dim=1)[:, :-1].max(dim=1)
    student_boxes = transform.apply_deltas(_deltas_of(deltas, classes), boxes)
    teacher_boxes = teacher_transform.apply_deltas(_deltas_of(teacher_deltas, classes), boxes)
    return weighted_giou_loss(student_boxes, teacher_boxes, scores)


def _deltas_of(deltas: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return (R, 4) of (R, 4 * K), or of (R, 4), which belong to all classes."""
    if deltas.shape[1] > 4:
        deltas = deltas.unflatten(1, (-1, 4))[torch.arange(len(classes), device=classes.device), classes]
    return deltas.float()


def _mask_loss(heads: Any, features: Features, record: HeadRecord) -> torch.Tensor:
    instances = record.mask_instances
    levels = [features[name] for name in heads.mask_in_features]
    with torch.no_grad():
        pooled = heads.mask_pooler(levels, [of_image.proposal_boxes for of_image in instances])
        teacher = heads.mask_head.layers(pooled)
    classes = torch.cat([of_image.gt_classes for of_image in instances])
    student = record.mask_logits[-1]
    return bernoulli_logit_loss(_masks_of(student, classes), _masks_of(teacher, classes))


def _masks_of(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return (N, M, M) of (N, K, M, M), or of (N, 1, M, M), which belong to all classes."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(classes), device=classes.device), classes]
