"""Errors that a user can act on, and the wording that messages share."""

import difflib
import math
from contextlib import contextmanager
from typing import Any, Callable, Collection, Iterator


class UserError(Exception):
    """A mistake in what the user gave: a config value, a file, a data set.

    The message stands alone: it names the value at fault and says what to do. The programs print it without a
    traceback and exit with status 1.
    """


class ArgumentError(ValueError):
    """An argument that a class or function of this project cannot use.

    Attributes:
        argument: its name as the caller wrote it; a dot leads into a mapping ("losses.pkd.weights").
        problem: the rest of the sentence that begins with the argument: "is -1; give a number > 0".
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument} {problem}")
        self.argument = argument
        self.problem = problem

    def __reduce__(self) -> Any:  # so that it survives the way from a worker process
        return type(self), (self.argument, self.problem)


@contextmanager
def named_as(name: Callable[[str], str]) -> Iterator[None]:
    """Turns an :class:`ArgumentError` into a UserError that names what the user wrote.

    Args:
        name: from the argument to the user's name for it, such as ``lambda a: f"MODEL.MGD.{a.upper()}"``.

    Raises:
        UserError: in place of an ArgumentError.
    """
    try:
        yield
    except ArgumentError as e:
        raise UserError(f"{name(e.argument)} {e.problem}") from e


def check_choice(argument: str, value: Any, choices: Collection[str]) -> None:
    """Raises ArgumentError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ArgumentError(argument, f"is {value!r}; use one of {', '.join(choices)}")


def check_positive(argument: str, value: Any) -> float:
    """``value`` as a float. Raises ArgumentError unless it is a finite number > 0."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ArgumentError(argument, f"is {value!r}; give a number > 0")
    return float(value)


def did_you_mean(name: str, names: Collection[str]) -> str:
    """The suggestion of the names closest to ``name``, to append to a message; "" where none is close."""
    close = difflib.get_close_matches(name, names, n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
