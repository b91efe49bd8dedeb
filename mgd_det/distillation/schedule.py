"""Which steps distil, and with what weight."""

import math

from mgd_det.errors import ArgumentError, check_count

DECAYS = ("constant", "linear", "cosine")


def decay_factor(decay: str, progress: float) -> float:
    """Return the factor of a loss's weight.

    Args:
        decay: "constant" (always 1), "linear" or "cosine" (both from 1 to 0).
        progress: the part of the distillation that is done, in [0, 1].

    Example:
        >>> [decay_factor("linear", t) for t in (0.0, 0.25, 1.0)]
        [1.0, 0.75, 0.0]
    """
    if decay == "linear":
        return 1 - progress
    if decay == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


class DistillationSchedule:
    """The steps that distil, of all steps of a training. Without :meth:`set_iteration`, all do.

    Attributes:
        interval: see the constructor.
    """

    def __init__(self, interval: int = 1, stop_iter: int = 0) -> None:
        """
        Args:
            interval: distil each step whose iteration is a multiple of this, > 0.
            stop_iter: the iteration from which on nothing is distilled, > 0; 0 for the end of training.

        Raises:
            ArgumentError: a value is not as above.
        """
        check_count("interval", interval)
        self.interval = interval
        if type(stop_iter) is not int or stop_iter < 0:
            raise ArgumentError("stop_iter", f"is {stop_iter!r}; give an iteration > 0, or 0 to distil to the end")
        self._stop_iter = stop_iter
        self._iteration, self._max_iter = 0, 0

    def set_iteration(self, iteration: int, max_iter: int) -> None:
        """Say which step comes next, of how many."""
        self._iteration, self._max_iter = iteration, max_iter

    def end_iteration(self, max_iter: int) -> int:
        """Return the iteration from which on nothing is distilled, in a training of ``max_iter`` iterations."""
        return min(self._stop_iter, max_iter) if self._stop_iter else max_iter

    @property
    def distils(self) -> bool:
        """Whether the present step distils."""
        has_ended = self._stop_iter > 0 and self._iteration >= self._stop_iter
        return self._iteration % self.interval == 0 and not has_ended

    @property
    def progress(self) -> float:
        """The part of the distillation that is done, in [0, 1]; 0 where the length of the training is unknown."""
        end = self.end_iteration(self._max_iter)
        return min(self._iteration / end, 1.0) if end else 0.0
