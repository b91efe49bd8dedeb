"""Losses between the predictions of the teacher's heads and the student's."""

from typing import Any, Dict, Mapping, Optional

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import StandardROIHeads
from torch import nn

from mgd_det.distillation import Teacher
from mgd_det.errors import ArgumentError
from mgd_det.modeling.head_distillation.compatibility import kind_of
from mgd_det.modeling.head_distillation.dense_heads import DenseHeads
from mgd_det.modeling.head_distillation.options import HeadOptions
from mgd_det.modeling.head_distillation.record import CurrentRecord, HeadRecord
from mgd_det.modeling.head_distillation.roi_heads import RoIHeads


class HeadDistillation:
    """Computes the losses of a detector's heads, whose teacher is a detector of the same kind.

    The teacher's heads run once a step, as far as a loss needs them, see :class:`DenseHeads` and :class:`RoIHeads`.

    A teacher of another kind, such as a classifier, brings its own: a method ``head_distillation(teacher, options)``,
    called with the :class:`Teacher` that holds it and :class:`HeadOptions`, which returns an object with the methods
    ``attach`` and ``losses`` of this class. It raises an ArgumentError for a loss that it does not have.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        logits: Optional[Mapping[str, Any]] = None,
        boxes: Optional[Mapping[str, Any]] = None,
        masks: Optional[Mapping[str, Any]] = None,
        cross_kd: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """
        Args:
            teacher: its whole detector.
            logits, boxes, masks, cross_kd: options of each loss in lower case (``weight``, ``decay``...), see the
                nodes of ``MODEL.MGD`` of these names; None for a loss that is off.

        Raises:
            ArgumentError: an unknown option, a wrong value, or a teacher that does not predict what is to be distilled.
        """
        options = HeadOptions.from_arguments(logits=logits, boxes=boxes, masks=masks, cross_kd=cross_kd)
        detector: Any = teacher.detector
        if hasattr(detector, "head_distillation"):
            self._heads: Any = detector.head_distillation(teacher, options)
        elif isinstance(detector, DenseDetector):
            self._heads = DenseHeads(teacher, options)
        elif isinstance(getattr(detector, "roi_heads", None), StandardROIHeads):
            self._heads = RoIHeads(teacher, options)
        else:
            first = options.on[0]
            raise ArgumentError(
                f"{first.argument}.weight",
                f"is {first.weight}, but the teacher, a {kind_of(detector)}, is not a RetinaNet, FCOS or R-CNN "
                "on an FPN: set it to 0, or give such a detector (in a LazyConfig: named_teacher(whole_detector=True))",
            )

    def attach(self, student: nn.Module, record: CurrentRecord) -> None:
        """From now on, put the predictions of ``student``'s training forwards into the record of the forward.

        Raises:
            UserError: teacher and student cannot be compared.
        """
        self._heads.attach(student, record)

    def losses(
        self, student: nn.Module, teacher_features: Dict[str, torch.Tensor], record: HeadRecord, progress: float = 0.0
    ) -> Dict[str, torch.Tensor]:
        """Compute the weighted losses of a training forward of the student, by the names under which they are logged.

        Args:
            student: the detector.
            teacher_features: the outputs of the teacher's backbone for the same images.
            record: of the same forward.
            progress: the part of the distillation that is done, in [0, 1].
        """
        losses: Dict[str, torch.Tensor] = self._heads.losses(student, teacher_features, record, progress)
        return losses
