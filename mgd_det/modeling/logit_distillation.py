"""Distillation of classification logits: the teacher's heads beside the student's."""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import StandardROIHeads
from torch import nn

from mgd_det.distillation import Teacher, sigmoid_logit_loss, softmax_logit_loss
from mgd_det.distillation.schedule import DECAYS, decay_factor
from mgd_det.errors import ArgumentError, UserError, check_choice, check_positive

Features = Dict[str, torch.Tensor]


@dataclass
class LogitRecord:
    """What one training forward of the student leaves for the loss of its logits.

    Attributes:
        logits: of each level of a dense detector, as its head gives them; or of each stage of a box head, (R, K + 1).
        boxes: the proposals of each stage of a box head.
    """

    logits: List[torch.Tensor] = field(default_factory=list)
    boxes: List[Any] = field(default_factory=list)


# Returns the record of the forward in progress, or None if nothing is to be recorded.
CurrentRecord = Callable[[], Optional[LogitRecord]]


class LogitDistillation:
    """Computes ``loss_kd_logits`` of a detector whose teacher is a detector of the same kind.

    Dense detectors (RetinaNet, FCOS): every anchor's classes, by :func:`sigmoid_logit_loss`. The R-CNNs: the box
    head's classes of the student's own sampled proposals, which the teacher's box head classifies too, by
    :func:`softmax_logit_loss`; of a cascade, the mean over its stages. Boxes, masks and centre-ness are not distilled.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        weight: float,
        temperature: float = 1.0,
        focal_gamma: float = 2.0,
        decay: str = "constant",
    ) -> None:
        """
        Args:
            teacher: its whole detector.
            weight, temperature, focal_gamma, decay: see ``MODEL.MGD.LOGITS``.

        Raises:
            ArgumentError: a wrong value, or a teacher of another kind than those above.
        """
        self._weight = check_positive("logits.weight", weight)
        self._temperature = check_positive("logits.temperature", temperature)
        if not focal_gamma >= 0:
            raise ArgumentError("logits.focal_gamma", f"is {focal_gamma!r}; give a number >= 0")
        self._gamma = focal_gamma
        check_choice("logits.decay", decay, DECAYS)
        self._decay = decay
        detector: Any = teacher.detector
        if isinstance(detector, DenseDetector):
            self._heads: Any = _DenseHeads(teacher)
        elif isinstance(getattr(detector, "roi_heads", None), StandardROIHeads):
            self._heads = _BoxHeads(teacher)
        else:
            kind = "backbone alone" if detector is None else type(detector).__name__
            raise ArgumentError(
                "logits.weight",
                f"is {weight}, but the teacher, a {kind}, is not a RetinaNet, FCOS or R-CNN on an FPN: set it to 0, or "
                "give such a detector (in a LazyConfig: named_teacher(whole_detector=True))",
            )

    def attach(self, student: nn.Module, record: CurrentRecord) -> None:
        """From now on, put the logits of ``student``'s training forwards into the record of the forward.

        Raises:
            UserError: teacher and student have no logits in common.
        """
        self._heads.attach(student, record)

    def loss(self, teacher_features: Features, record: LogitRecord, progress: float = 0.0) -> Features:
        """Compute ``loss_kd_logits`` of a training forward of the student.

        Args:
            teacher_features: the outputs of the teacher's backbone for the same images.
            record: of the same forward.
            progress: the part of the distillation that is done, in [0, 1].
        """
        pairs = self._heads.pairs(teacher_features, record)
        if isinstance(self._heads, _DenseHeads):
            losses = [sigmoid_logit_loss(s, t, self._temperature, self._gamma) for s, t in pairs]
        else:
            losses = [softmax_logit_loss(s, t, self._temperature) for s, t in pairs]
        weight = self._weight * decay_factor(self._decay, progress)
        return {"loss_kd_logits": weight * torch.stack(losses).mean()}


Pairs = List[Tuple[torch.Tensor, torch.Tensor]]


class _DenseHeads:
    """One pair: the logits of all levels, images, anchors and classes in a row."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def attach(self, student: nn.Module, record: CurrentRecord) -> None:
        teacher: Any = self._teacher.detector
        _check_kind(isinstance(student, type(teacher)) or isinstance(teacher, type(student)), student, teacher)
        assert isinstance(student, DenseDetector)
        _check_classes(student.num_classes, teacher.num_classes)
        anchors = [list(detector.anchor_generator.cell_anchors) for detector in (student, teacher)]
        if len(anchors[0]) != len(anchors[1]) or any(
            a.shape != b.shape or not torch.allclose(a, b.to(a), rtol=1e-3) for a, b in zip(*anchors)
        ):
            raise UserError(
                "MODEL.MGD.LOGITS.WEIGHT is > 0, but teacher and student have different anchors, so that their logits "
                "cannot be compared: give them the same MODEL.ANCHOR_GENERATOR and levels, or set the weight to 0"
            )
        self._record = record
        student.head.register_forward_hook(self._keep)

    def _keep(self, head: nn.Module, args: Any, output: Any) -> None:
        record = self._record()
        if record is not None:
            record.logits = output[0]

    def pairs(self, features: Features, record: LogitRecord) -> Pairs:
        teacher: Any = self._teacher.detector
        with torch.no_grad():
            logits = teacher.head([features[name] for name in teacher.head_in_features])[0]
        return [(_in_a_row(record.logits), _in_a_row(logits))]


class _BoxHeads:
    """A pair for each stage of the box head: the logits (R, K + 1) of the student's proposals."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def attach(self, student: nn.Module, record: CurrentRecord) -> None:
        teacher: Any = self._teacher.detector
        student_heads: Any = getattr(student, "roi_heads", None)
        teacher_heads = teacher.roi_heads
        _check_kind(isinstance(student_heads, StandardROIHeads), student, teacher)
        stages = [_stages(heads) for heads in (student_heads, teacher_heads)]
        _check_kind(len(stages[0]) == len(stages[1]), student_heads, teacher_heads)
        _check_classes(student_heads.num_classes, teacher_heads.num_classes)
        for _, predictor in [*stages[0], *stages[1]]:
            if getattr(predictor, "use_sigmoid_ce", False):
                raise UserError(
                    "MODEL.MGD.LOGITS.WEIGHT is > 0, but MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is set, whose logits are "
                    "not distilled: turn one of them off"
                )
        self._record = record
        student_heads.box_pooler.register_forward_pre_hook(self._keep_boxes)
        for _, predictor in stages[0]:
            predictor.register_forward_hook(self._keep_logits)

    def _keep_boxes(self, pooler: nn.Module, args: Any) -> None:
        record = self._record()
        if record is not None:
            record.boxes.append(args[1])

    def _keep_logits(self, predictor: nn.Module, args: Any, output: Any) -> None:
        record = self._record()
        if record is not None:
            record.logits.append(output[0])

    def pairs(self, features: Features, record: LogitRecord) -> Pairs:
        teacher: Any = self._teacher.detector
        heads = teacher.roi_heads
        levels = [features[name] for name in heads.box_in_features]
        with torch.no_grad():
            return [
                (student, predictor(head(heads.box_pooler(levels, boxes)))[0])
                for student, boxes, (head, predictor) in zip(record.logits, record.boxes, _stages(heads))
            ]


def _stages(heads: Any) -> List[Tuple[nn.Module, nn.Module]]:
    """Return (box head, predictor) of each stage; a cascade has several."""
    if isinstance(heads.box_predictor, nn.ModuleList):
        return list(zip(heads.box_head, heads.box_predictor))
    return [(heads.box_head, heads.box_predictor)]


def _in_a_row(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([level.flatten() for level in logits])


def _check_kind(same: bool, student: Any, teacher: Any) -> None:
    if not same:
        raise UserError(
            f"MODEL.MGD.LOGITS.WEIGHT is > 0, but the student is a {type(student).__name__} and the teacher a "
            f"{type(teacher).__name__}: their logits cannot be compared. Set it to 0, or use a teacher of "
            "the same kind"
        )


def _check_classes(student: int, teacher: int) -> None:
    if student != teacher:
        raise UserError(
            f"MODEL.MGD.LOGITS.WEIGHT is > 0, but the student has {student} classes and the teacher {teacher}: set "
            "it to 0, or use a teacher of the same classes"
        )
