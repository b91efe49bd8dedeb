"""Positions: which student feature learns from which teacher feature."""

from dataclasses import dataclass
from typing import Collection, Dict, List, Sequence

import torch

from mgd_det.errors import ArgumentError


@dataclass(frozen=True)
class Position:
    """A student feature paired with a teacher feature.

    Attributes:
        student, teacher: names of the features in their nets.
        student_channels, teacher_channels: their channels, as measured.
    """

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int

    @property
    def name(self) -> str:
        """The student's feature with "_" for the dot of "res2.expansion", as in ``loss_mgd_<name>``."""
        return self.student.replace(".", "_")


def parse_position(text: str, student: Collection[str], teacher: Collection[str]) -> List[str]:
    """Read "res2" or "res2.expansion=res2" as [student feature, teacher feature].

    Args:
        text: the position.
        student, teacher: names of the features that the nets offer.

    Raises:
        ArgumentError: a net does not have the feature. The message lists those that it has.

    Example:
        >>> parse_position("res2.expansion=res2", ["res2", "res2.expansion"], ["res2", "res3"])
        ['res2.expansion', 'res2']
    """
    student_name, _, teacher_name = text.partition("=")
    pair = [student_name, teacher_name or student_name]
    for net, name, candidates in (("student", pair[0], student), ("teacher", pair[1], teacher)):
        if name not in candidates:
            has = (
                f"It has: {', '.join(candidates)}." if candidates else "It declares none: see distillation_features()."
            )
            problem = f"contains {text!r}, but the {net} does not have the feature {name!r}. {has}"
            raise ArgumentError("positions", problem)
    return pair


def make_positions(
    pairs: Sequence[Sequence[str]], student: Dict[str, torch.Tensor], teacher: Dict[str, torch.Tensor]
) -> List[Position]:
    """Pair the features of one trial forward.

    Args:
        pairs: [student feature, teacher feature] each.
        student, teacher: features by name, (1, C, H, W), made of the same image.

    Raises:
        ArgumentError: maps of different size, or a student feature that is named twice.
    """
    positions = []
    for student_name, teacher_name in pairs:
        s, t = student[student_name].shape, teacher[teacher_name].shape
        if s[2:] != t[2:]:
            raise ArgumentError(
                "positions",
                f"pairs maps of different size: of one image, the student's {student_name!r} is {s[2]} x {s[3]} and "
                f"the teacher's {teacher_name!r} is {t[2]} x {t[3]}. Student: {_sizes(student)}. "
                f"Teacher: {_sizes(teacher)}.",
            )
        positions.append(Position(student_name, teacher_name, s[1], t[1]))
    names = [position.name for position in positions]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError("positions", f"names the student's {name!r} more than once")
    return positions


def _sizes(features: Dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {x.shape[2]} x {x.shape[3]}" for name, x in features.items())
