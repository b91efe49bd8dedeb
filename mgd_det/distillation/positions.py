"""Positions: which student feature learns from which teacher feature, and channel from channel."""

import re
import zlib
from dataclasses import dataclass
from typing import Collection, Dict, List, Optional, Sequence, Union

import torch

from mgd_det.errors import ArgumentError, check_choice

# How student and teacher channels find each other; see MODEL.MGD.MATCHING.KINDS.
MATCHINGS = ("assignment", "identity", "adapter", "random", "inherited")


@dataclass(frozen=True)
class Position:
    """A student feature paired with a teacher feature.

    Attributes:
        student, teacher: names of the features in their nets.
        student_channels, teacher_channels: their channels, as measured.
        matching: one of :data:`MATCHINGS`. Only "assignment" changes during training.
    """

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int
    matching: str = "assignment"

    @property
    def name(self) -> str:
        """The student's feature with "_" for the dot of "res2.expansion", as in ``loss_mgd_<name>``."""
        return self.student.replace(".", "_")

    @property
    def matched_channels(self) -> int:
        """The student's channels as a loss sees them: behind an adapter, as many as the teacher's."""
        return self.teacher_channels if self.matching == "adapter" else self.student_channels

    def fixed_groups(self, group_size: int) -> Optional[torch.Tensor]:
        """Return the groups of a matching that never changes, (matched channels, group size) long; None otherwise.

        Those of "inherited" never change either, but are known only when the student has inherited.

        Args:
            group_size: teacher channels of a student channel, 1 for "identity" and "adapter".
        """
        if self.matching in ("identity", "adapter"):
            return torch.arange(self.teacher_channels).unsqueeze(1)
        if self.matching == "random":
            generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
            groups = torch.full((self.student_channels, group_size), -1)
            rows = torch.randperm(self.student_channels, generator=generator)[: self.teacher_channels]
            teacher = torch.randperm(self.teacher_channels, generator=generator)[: len(rows) * group_size]
            groups[rows] = teacher.view(len(rows), group_size).sort(dim=1).values
            return groups
        return None


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
    pairs: Sequence[Sequence[str]],
    student: Dict[str, torch.Tensor],
    teacher: Dict[str, torch.Tensor],
    matchings: Union[str, Sequence[str]] = "auto",
    inherits_fpn: bool = False,
) -> List[Position]:
    """Pair the features of one trial forward.

    Args:
        pairs: [student feature, teacher feature] each.
        student, teacher: features by name, (1, C, H, W), made of the same image.
        matchings: for each pair, or one for all: one of :data:`MATCHINGS`, or "auto", which is "identity" at FPN levels
            of equal width, "inherited" at narrower ones if ``inherits_fpn``, and "assignment" elsewhere. "inherited" is
            "identity" where the widths are equal.
        inherits_fpn: the student's FPN starts from some of the channels of the teacher's.

    Raises:
        ArgumentError: maps of different size, a student feature that is named twice, or an unsuitable matching.
    """
    given = [matchings] if isinstance(matchings, str) else list(matchings)
    for matching in given:
        check_choice("matchings", matching, ("auto", *MATCHINGS))
    if len(given) not in (1, len(pairs)):
        raise ArgumentError("matchings", f"is {given}; give one, or {len(pairs)}, one a position")
    positions = []
    for i, (student_name, teacher_name) in enumerate(pairs):
        s, t = student[student_name].shape, teacher[teacher_name].shape
        if s[2:] != t[2:]:
            raise ArgumentError(
                "positions",
                f"pairs maps of different size: of one image, the student's {student_name!r} is {s[2]} x {s[3]} and "
                f"the teacher's {teacher_name!r} is {t[2]} x {t[3]}. Student: {_sizes(student)}. "
                f"Teacher: {_sizes(teacher)}.",
            )
        matching = given[i % len(given)]
        are_levels = all(re.fullmatch(r"p\d+", name) for name in (student_name, teacher_name))
        if matching == "auto":
            is_inherited = are_levels and (s[1] == t[1] or (inherits_fpn and s[1] < t[1]))
            matching = "inherited" if is_inherited else "assignment"
        if matching == "inherited":
            if not are_levels or s[1] > t[1]:
                raise ArgumentError(
                    "matchings",
                    f"is 'inherited' at {student_name!r}, but it is for levels of an FPN that is not wider than the "
                    f"teacher's; the student has {s[1]} channels there and the teacher's {teacher_name!r} {t[1]}; use "
                    "'assignment'",
                )
            matching = "identity" if s[1] == t[1] else "inherited"
        if matching == "identity" and s[1] != t[1]:
            raise ArgumentError(
                "matchings",
                f"is 'identity' at {student_name!r}, but the student has {s[1]} channels there and the teacher {t[1]}; "
                "use 'assignment'",
            )
        positions.append(Position(student_name, teacher_name, s[1], t[1], matching))
    names = [position.name for position in positions]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError("positions", f"names the student's {name!r} more than once")
    return positions


def _sizes(features: Dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {x.shape[2]} x {x.shape[3]}" for name, x in features.items())
