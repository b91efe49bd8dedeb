"""CrossKD: the student's features in the teacher's head (Wang et al., CVPR 2024, arXiv:2306.11369)."""

from contextlib import contextmanager
from typing import Any, Iterator, List, Sequence, Tuple

import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from mgd_det.modeling.head_distillation.compatibility import check_heads
from mgd_det.modeling.head_distillation.options import CrossHeadOptions
from mgd_det.modeling.head_distillation.record import CurrentRecord, HeadRecord

# The features of the tower of classes and of the tower of boxes, (B, C, H, W) of each level.
TowerFeatures = Tuple[List[torch.Tensor], List[torch.Tensor]]


class CrossHeads:
    """Lets features of the student's head pass through the rest of the teacher's head.

    In each of the two towers (classes, boxes), the student's feature behind ``layer`` convolutions, before the
    activation, goes through the teacher's activation, further convolutions and prediction layer. These are frozen, but
    the gradient passes to the student. Before that, each channel gets the mean and the standard deviation that the
    teacher's feature at the same place has, as in the authors' code (:func:`match_moments`).
    """

    def __init__(self, options: CrossHeadOptions) -> None:
        self._options = options
        self._layer = options.layer

    def attach(self, student: nn.Module, teacher: nn.Module, record: CurrentRecord) -> None:
        """Record the features of ``student``'s head in training forwards.

        Raises:
            UserError: the heads are not of RetinaNet's form, have too few convolutions, or differ in width.
        """
        on, heads = [self._options], (student, teacher)
        for head in heads:
            check_heads(
                isinstance(head, RetinaNetHead) and min(map(_convolutions, _towers(head))) > 0,
                on,
                f"but a head, a {type(head).__name__}, has no towers of convolutions as RetinaNet's has",
                "use heads of RetinaNet or FCOS",
            )
        counts = [min(map(_convolutions, _towers(head))) for head in heads]
        self._layer = counts[1] - 1 if self._options.layer < 0 else self._options.layer
        check_heads(
            self._layer <= min(counts),
            on,
            f"and MODEL.MGD.CROSS_KD.LAYER is {self._options.layer}, here {self._layer} convolutions, but the "
            f"student's head has {counts[0]} and the teacher's {counts[1]}",
            f"set LAYER to at most {min(counts)}",
        )
        widths = [[_width(tower, self._layer) for tower in _towers(head)] for head in heads]
        check_heads(
            widths[0] == widths[1],
            on,
            f"but behind {self._layer} convolutions the student's head has {_joined(widths[0])} channels and the "
            f"teacher's {_joined(widths[1])}",
            "use a teacher whose head is as wide",
        )
        self._record = record
        classes, boxes = (_entry(tower, self._layer) for tower in _towers(student))
        classes.register_forward_pre_hook(self._keep_class_features)
        boxes.register_forward_pre_hook(self._keep_box_features)

    def _keep_class_features(self, module: nn.Module, args: Any) -> None:
        record = self._record()
        if record is not None:
            record.class_features.append(args[0])

    def _keep_box_features(self, module: nn.Module, args: Any) -> None:
        record = self._record()
        if record is not None:
            record.box_features.append(args[0])

    @contextmanager
    def reading(self, teacher: nn.Module) -> Iterator[TowerFeatures]:
        """Read the features of the teacher's head while it runs."""
        features: TowerFeatures = ([], [])
        handles = [
            _entry(tower, self._layer).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            for tower, kept in zip(_towers(teacher), features)
        ]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()

    def predictions(self, teacher: Any, record: HeadRecord, features: TowerFeatures) -> TowerFeatures:
        """Return logits and deltas of the student's features in the teacher's head, of each level.

        Args:
            teacher: its head.
            record: of the student's forward.
            features: of the teacher's, from :meth:`reading`.
        """
        predictions: TowerFeatures = ([], [])
        own = (record.class_features, record.box_features)
        for tower, predict, of_student, of_teacher, kept in zip(
            _towers(teacher), (teacher.cls_score, teacher.bbox_pred), own, features, predictions
        ):
            rest = tower[_index(tower, self._layer) :]
            kept.extend(predict(rest(match_moments(s, t))) for s, t in zip(of_student, of_teacher))
        return predictions


def match_moments(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Give each channel of the student the mean and standard deviation of the teacher's, over images and places.

    The authors' code has it (align_scale). It is computed in float32; only the student gets a gradient.

    Args:
        student: (B, C, H, W).
        teacher: of the same shape.

    Returns:
        (B, C, H, W), equal to ``student`` except for an affine map of each channel.
    """
    student, teacher = student.float(), teacher.detach().float()
    (s_var, s_mean), (t_var, t_mean) = (
        torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True) for x in (student, teacher)
    )
    # A channel that is constant, except for rounding, has no direction to learn: its gradient would be amplified noise.
    varies = s_var > 1e-10 * s_mean.square() + 1e-12
    return (student - s_mean) * torch.where(varies, (s_var + 1e-12).rsqrt() * t_var.sqrt(), 0.0) + t_mean


def _towers(head: Any) -> Tuple[nn.Sequential, nn.Sequential]:
    """Return the towers of classes and of boxes; empty ones of a head of another form."""
    empty = nn.Sequential()
    return getattr(head, "cls_subnet", empty), getattr(head, "bbox_subnet", empty)


def _activations(tower: nn.Sequential) -> List[int]:
    return [i for i, module in enumerate(tower) if isinstance(module, nn.ReLU)]


def _convolutions(tower: nn.Sequential) -> int:
    return len(_activations(tower))


def _index(tower: nn.Sequential, layer: int) -> int:
    """Return the index of the first module behind ``layer`` convolutions and their norms: an activation, or 0."""
    return 0 if layer == 0 else _activations(tower)[layer - 1]


def _entry(tower: nn.Sequential, layer: int) -> nn.Module:
    return tower[_index(tower, layer)]


def _width(tower: nn.Sequential, layer: int) -> int:
    """Return the channels behind ``layer`` convolutions."""
    if layer == 0:
        return next(m for m in tower.modules() if isinstance(m, nn.Conv2d)).in_channels
    # Not those inside a separable convolution, which is a Conv2d itself.
    return [m for m in tower[: _index(tower, layer)] if isinstance(m, nn.Conv2d)][-1].out_channels


def _joined(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, dict.fromkeys(numbers)))
