"""Which detectors' heads can be compared: one message that names the keys for those that cannot."""

from typing import Any, Optional, Sequence

from torch import nn

from mgd_det.errors import UserError
from mgd_det.modeling.head_distillation.options import HeadLossOptions


def kind_of(detector: Optional[nn.Module]) -> str:
    """Return what teaches, for a message: the name of the detector's class, or "backbone alone" for None."""
    return "backbone alone" if detector is None else type(detector).__name__


def check_heads(same: bool, on: Sequence[HeadLossOptions], problem: str, remedy: str) -> None:
    """Check that what is distilled can be compared.

    Args:
        same: whether it can.
        on: the losses that need it.
        problem: what differs between teacher and student: "but ...".
        remedy: what to do, other than to set the weights to 0.

    Raises:
        UserError: ``same`` is False.
    """
    if not same:
        keys = " and ".join(options.key for options in on)
        are, them = ("is", "it") if len(on) == 1 else ("are", "them")
        raise UserError(f"{keys} {are} > 0, {problem}. Set {them} to 0, or {remedy}")


def check_kind(same: bool, on: Sequence[HeadLossOptions], student: Any, teacher: Any) -> None:
    """Check that student and teacher are of the same kind, as :func:`check_heads`."""
    problem = (
        f"but the student is a {type(student).__name__} and the teacher a {type(teacher).__name__}, whose predictions "
        "cannot be compared"
    )
    check_heads(same, on, problem, "use a teacher of the same kind")


def check_classes(student: int, teacher: int, on: Sequence[HeadLossOptions]) -> None:
    """Check that student and teacher have the same number of classes, as :func:`check_heads`."""
    problem = f"but the student has {student} classes and the teacher {teacher}"
    check_heads(student == teacher, on, problem, "use a teacher of the same classes")
