"""Errors that a user can act on, and parts of their messages."""

import difflib
import math
from contextlib import contextmanager
from typing import Any, Callable, Collection, Iterable, Iterator


class UserError(Exception):
    """A mistake in the user's input: a config value, a file, a data set.

    The message names the wrong value and says what to do. The programs print it without a traceback and exit with
    status 1.
    """


class ArgumentError(ValueError):
    """An argument that a class or function of this project cannot use.

    Attributes:
        argument: its name. A dot leads into a mapping ("losses.pkd.weights").
        problem: the rest of the sentence that starts with the argument: "is -1; give a number > 0".
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument} {problem}")
        self.argument = argument
        self.problem = problem

    def __reduce__(self) -> Any:  # so that a worker process can send it
        return type(self), (self.argument, self.problem)


@contextmanager
def named_as(name: Callable[[str], str]) -> Iterator[None]:
    """Turn an :class:`ArgumentError` of the ``with`` block into a UserError that names the user's key.

    Args:
        name: gives the key for an argument, such as ``lambda argument: f"MODEL.MGD.{argument.upper()}"``.

    Raises:
        UserError: the block raised an ArgumentError.
    """
    try:
        yield
    except ArgumentError as e:
        raise UserError(f"{name(e.argument)} {e.problem}") from e


def check_choice(argument: str, value: Any, choices: Collection[str]) -> None:
    """Check that a value is one of ``choices``.

    Raises:
        ArgumentError: it is not.
    """
    if value not in choices:
        raise ArgumentError(argument, f"is {value!r}; use one of {', '.join(choices)}")


def check_positive(argument: str, value: Any) -> float:
    """Return a number as a float.

    Raises:
        ArgumentError: it is not a finite number > 0.
    """
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ArgumentError(argument, f"is {value!r}; give a number > 0")
    return float(value)


def check_count(argument: str, value: Any) -> int:
    """Return a whole number.

    Raises:
        ArgumentError: it is not an int > 0.
    """
    if type(value) is not int or value <= 0:
        raise ArgumentError(argument, f"is {value!r}; give a whole number > 0")
    return value


def check_not_negative(argument: str, value: Any) -> float:
    """Return a number as a float.

    Raises:
        ArgumentError: it is not a finite number >= 0.
    """
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ArgumentError(argument, f"is {value!r}; give a number >= 0")
    return float(value)


def check_options(argument: str, given: Iterable[str], known: Collection[str]) -> None:
    """Check the names in a mapping of options.

    Args:
        argument: that has the mapping.
        given: names in it.
        known: names that it may have.

    Raises:
        ArgumentError: a name is not known. The message lists those that are.
    """
    for name in given:
        if name not in known:
            raise ArgumentError(f"{argument}.{name}", f"is unknown; the options are: {', '.join(known)}")


def did_you_mean(name: str, names: Collection[str]) -> str:
    """Return a sentence that suggests the names closest to ``name``, to append to a message; "" if none is close."""
    close = difflib.get_close_matches(name, names, n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
