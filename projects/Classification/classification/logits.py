"""Knowledge distillation of a classifier's logits (Hinton et al., 2015), for mgd_det's Distillation.

Shape shorthand: B images, K classes.
"""

from typing import Any, Dict, List

import torch
from torch import nn

from mgd_det.distillation import Teacher, softmax_logit_loss
from mgd_det.errors import ArgumentError
from mgd_det.modeling.head_distillation import CurrentRecord, HeadOptions, HeadRecord, check_classes, check_kind


class ClassifierLogits:
    """Computes ``loss_kd_logits``: T^2 KL(teacher || student) of the logits at temperature T, mean over the images."""

    def __init__(self, teacher: Teacher, options: HeadOptions) -> None:
        """
        Args:
            teacher: a whole classifier.
            options: with ``logits`` on.

        Raises:
            ArgumentError: another loss of heads is on, which a classifier does not have.
        """
        for other in options.on:
            if other is not options.logits:
                raise ArgumentError(
                    f"{other.argument}.weight", f"is {other.weight}, but a classifier has only logits: set it to 0"
                )
        assert options.logits is not None
        self._teacher, self._options = teacher, options.logits

    def attach(self, student: nn.Module, record: CurrentRecord) -> None:
        """Keep the logits of ``student``'s training forwards, (B, K), in the record of the forward.

        Raises:
            UserError: the student is no classifier, or has another number of classes.
        """
        teacher: Any = self._teacher.detector
        check_kind(hasattr(student, "linear") and hasattr(student, "num_classes"), [self._options], student, teacher)
        linear: Any = student.get_submodule("linear")
        check_classes(linear.out_features, teacher.num_classes, [self._options])
        self._record = record
        linear.register_forward_hook(self._keep)

    def losses(
        self, student: nn.Module, features: Dict[str, torch.Tensor], record: HeadRecord, progress: float
    ) -> Dict[str, torch.Tensor]:
        """Return the weighted loss; see ``HeadDistillation.losses`` of mgd_det."""
        teacher: Any = self._teacher.detector
        with torch.no_grad():
            theirs = teacher.logits(features)
        logits: List[torch.Tensor] = record.logits
        loss = softmax_logit_loss(logits[0], theirs, self._options.temperature)
        return {"loss_kd_logits": self._options.weighted(loss, progress)}

    def _keep(self, linear: nn.Module, args: Any, output: torch.Tensor) -> None:
        record = self._record()
        if record is not None:
            record.logits.append(output)
