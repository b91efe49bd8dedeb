"""The teacher's FPN and heads as the student's start: which tensors fit, and a report of them."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Collection, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from mgd_det.checkpoint.weights_format import without_counts
from mgd_det.errors import ArgumentError
from mgd_det.matching import closest_separable
from mgd_det.modeling.factorising import SeparableFactors, factorised_layers
from mgd_det.modeling.narrowing import Narrowed

# What a student can inherit: everything of the backbone outside "bottom_up", everything outside the backbone.
PARTS = ("fpn", "head")

Shape = Tuple[int, ...]

# Layers with outputs for each class, in Detectron2's detectors: "head.cls_score.weight" of RetinaNet and FCOS,
# "roi_heads.box_predictor.0.cls_score.weight" of a Cascade R-CNN...
_CLASS_LAYER = re.compile(
    r"head\.cls_score\.\w+|roi_heads\.box_predictor\.(\d+\.)?(cls_score\.\w+|fed_loss_cls_weights)"
)
# Layers that have them unless they are class-agnostic, with the number of outputs that an agnostic one has.
_PERHAPS_CLASS_LAYER = (
    (re.compile(r"roi_heads\.box_predictor\.(\d+\.)?bbox_pred\.\w+"), 4),
    (re.compile(r"roi_heads\.mask_head\.predictor\.\w+"), 1),
)


@dataclass(frozen=True)
class InheritanceReport:
    """What a student inherited. It prints as a table with one row for each module.

    Attributes:
        inherited: number of values by name of each tensor that the student now has from the teacher.
        other_shape: tensors that both have, in different shapes: the teacher's and the student's.
        other_classes: tensors of the layers that are left out because teacher and student have different classes.
        not_in_student: the teacher's tensors of these parts that the student does not have.
        not_in_teacher: the student's tensors of these parts that the teacher does not have.
        sliced: the inherited ones that have lost channels: the teacher's shape and what is left of it.
        factorised: by name of a separable convolution that was inherited from a dense one, the share of the kernels'
            energy (sum of squares) that the closest separable ones keep, 0 to 1.
        narrowed: the channels that were chosen where the student is narrower; None if it is not.
    """

    inherited: Dict[str, int] = field(default_factory=dict)
    other_shape: Dict[str, Tuple[Shape, Shape]] = field(default_factory=dict)
    other_classes: List[str] = field(default_factory=list)
    not_in_student: List[str] = field(default_factory=list)
    not_in_teacher: List[str] = field(default_factory=list)
    sliced: Dict[str, Tuple[Shape, Shape]] = field(default_factory=dict)
    factorised: Dict[str, float] = field(default_factory=dict)
    narrowed: Optional[Narrowed] = None

    def empty_parts(self, parts: Iterable[str]) -> List[str]:
        """Return those of ``parts`` of which nothing was inherited."""
        return [part for part in parts if part not in {_part(name) for name in self.inherited}]

    def __str__(self) -> str:
        columns: List[Collection[str]] = [self.inherited, self.other_shape, self.other_classes]
        columns += [self.not_in_student, self.not_in_teacher]
        headers = ["module", "tensors\ninherited", "values\ninherited", "other\nshape", "other\nclasses"]
        headers += ["not in\nthe student", "not in\nthe teacher"]
        if self.sliced:
            columns.append(self.sliced)
            headers.append("of the inherited,\nwith channels left out")
        counts = [Counter(_module(name) for name in without_counts(column)) for column in columns]
        values = Counter[str]()
        for name in without_counts(self.inherited):
            values[_module(name)] += self.inherited[name]
        modules = list(dict.fromkeys(module for count in counts for module in count))
        rows = [[m, counts[0][m], values[m], *(count[m] for count in counts[1:])] for m in modules]
        rows.append(["total", sum(counts[0].values()), sum(values.values()), *(sum(c.values()) for c in counts[1:])])
        lines = [tabulate(rows, headers=headers)]
        if self.narrowed is not None and self.narrowed.channels:
            lines.append(f"Channels of the teacher that the student has:\n{self.narrowed}")
        for name, share in self.factorised.items():
            factors = self.narrowed.factors.get(name) if self.narrowed is not None else None
            shown = "" if factors is None else f"; fitted, error of its outputs {100 * factors.error:.1f} %"
            lines.append(f"Factorised: {name}, {100 * share:.1f} % of its kernels' energy is separable{shown}")
        lines += [
            f"Other shape: {name} {teacher} in the teacher, {student} in the student"
            for name, (teacher, student) in self.other_shape.items()
        ]
        if self.other_classes:
            lines.append(f"Other classes, so not inherited: {', '.join(self.other_classes)}")
        return "\n".join(lines)


def inherit(
    student: nn.Module,
    teacher_state: Mapping[str, Tensor],
    parts: Sequence[str],
    same_classes: bool = True,
    narrowed: Optional[Narrowed] = None,
) -> InheritanceReport:
    """Give a student the tensors of its teacher's FPN and heads that have the same name and shape.

    A :class:`~mgd_det.modeling.light.SeparableConv2d` of the student also fits a dense convolution of the teacher that
    has its name and size: it gets the factors that ``narrowed`` has for it, or else the closest ones
    (:func:`~mgd_det.matching.closest_separable`).

    Args:
        student: a detector whose "backbone" has an FPN around a "bottom_up", as Detectron2's detectors do.
        teacher_state: tensors of the teacher's detector by name.
        parts: one or more of :data:`PARTS`: "fpn" is everything of the backbone outside "bottom_up", "head" is every
            module outside the backbone.
        same_classes: False leaves out the layers with outputs for each class: as many classes are not the same ones.
        narrowed: for a student with fewer channels or separable convolutions, what :func:`narrow` made of the teacher's
            tensors.

    Raises:
        ArgumentError: a part is unknown, or nothing fits.
    """
    check_parts(parts)
    sliced = {} if narrowed is None else narrowed.tensors
    own = student.state_dict()
    separable = {f"{name}.weight": name for name in factorised_layers(student, teacher_state)}
    wanted, present = _of_parts(teacher_state, parts), _of_parts(own, parts)
    report = InheritanceReport(
        not_in_student=[name for name in wanted if name not in own],
        not_in_teacher=[name for name in present if name not in teacher_state],
        narrowed=narrowed,
    )
    with torch.no_grad():
        for name in (name for name in wanted if name in own):
            value, place = sliced.get(name, teacher_state[name]), own[name]
            layer = separable.get(name)
            is_dense = layer is not None and value.shape[:2] == place.shape[:2]
            if value.shape != place.shape and not is_dense:
                report.other_shape[name] = tuple(teacher_state[name].shape), tuple(place.shape)
                continue
            if not same_classes and _depends_on_classes(name, value):
                report.other_classes.append(name)
                continue
            if layer is not None:
                depthwise = f"{layer}.depthwise.weight"
                factors = None if narrowed is None else narrowed.factors.get(layer)
                report.factorised[layer] = _factorise(value, own[depthwise], place, factors)
                report.inherited[depthwise] = own[depthwise].numel()
                report.not_in_teacher.remove(depthwise)
            else:
                place.copy_(value)
            report.inherited[name] = place.numel()
            if value.shape != teacher_state[name].shape:
                report.sliced[name] = tuple(teacher_state[name].shape), tuple(value.shape)
    if not report.inherited:
        raise ArgumentError("parts", f"is {list(parts)}, but {_why_nothing_fits(report, own)}. {_ADVICE}")
    return report


def _factorise(weight: Tensor, depthwise: Tensor, pointwise: Tensor, factors: Optional[SeparableFactors]) -> float:
    """Write a separable convolution in place of a dense one, and return how much of its energy the closest one keeps.

    Without measured ``factors`` the closest one is written. It is the closest in its weights, not in its outputs. Each
    input channel has a fit of its own, so weights for the channels, such as their mean square, would change nothing.
    """
    closest = closest_separable(weight)
    depthwise.copy_(closest[0] if factors is None else factors.depthwise)
    pointwise.copy_(closest[1] if factors is None else factors.pointwise)
    energy = weight.double().square().sum().item()
    # The closest one is a projection: its energy is what it keeps.
    kept = (closest[1] * closest[0].transpose(0, 1)).double().square().sum().item()
    return min(kept / energy, 1.0) if energy > 0 else 1.0


_ADVICE = (
    "Give the student the teacher's kind of detector and an FPN that is not wider, name a trained detector as the "
    "teacher, or set it to [] to inherit nothing"
)


def check_parts(parts: Sequence[str]) -> None:
    """Check the names of parts to inherit.

    Raises:
        ArgumentError: a name is not one of :data:`PARTS`.
    """
    if isinstance(parts, str) or any(part not in PARTS for part in parts):
        choices = ", ".join(f'"{part}"' for part in PARTS)
        raise ArgumentError(
            "parts", f"is {parts if isinstance(parts, str) else list(parts)!r}; give a list of {choices}"
        )


def _of_parts(state: Mapping[str, Tensor], parts: Sequence[str]) -> List[str]:
    has_fpn = any(name.startswith("backbone.bottom_up.") for name in state)
    names = [name for name in state if _part(name) in parts]
    return [name for name in names if has_fpn or _part(name) != "fpn"]


def _part(name: str) -> str:
    """Return the part that a detector's tensor belongs to, or ""."""
    if name.startswith("backbone."):
        return "" if name.startswith("backbone.bottom_up.") else "fpn"
    # A tensor of the detector itself is no head's: the mean of the pixels is the student's own.
    return "head" if "." in name else ""


def _module(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _depends_on_classes(name: str, value: Tensor) -> bool:
    if _CLASS_LAYER.fullmatch(name):
        return True
    return any(layer.fullmatch(name) and len(value) > agnostic for layer, agnostic in _PERHAPS_CLASS_LAYER)


def _why_nothing_fits(report: InheritanceReport, own: Mapping[str, Tensor]) -> str:
    if report.other_shape:
        name, (teacher, student) = next(iter(report.other_shape.items()))
        return f"no tensor of the teacher fits: {name} is {teacher} in the teacher and {student} in the student"
    if report.not_in_student:
        return f"no tensor of the teacher fits: the student has no {report.not_in_student[0]}"
    if report.other_classes:
        return "nothing but layers of other classes would fit"
    return "the teacher's weights have no tensor of these parts"
