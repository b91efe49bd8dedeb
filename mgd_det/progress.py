"""Progress of long work in the log: how much is done, and about how long the rest takes."""

import logging
import time
from typing import Optional


class ProgressLog:
    """Logs every ten seconds. Call it after each part with the number of parts done.

    Example:
        >>> progress = ProgressLog(logging.getLogger(__name__), "Reading images", total=5000)
        >>> for done, path in enumerate(paths, start=1):
        ...     read(path)
        ...     progress(done)
    """

    def __init__(
        self, logger: logging.Logger, what: str, total: Optional[int] = None, seconds_between_lines: float = 10.0
    ) -> None:
        """
        Args:
            what: the work, the beginning of the line: "Reading images".
            total: parts in all; None where each call tells it.
            seconds_between_lines: >= 0.
        """
        self._logger, self._what, self._total = logger, what, total
        self._interval = seconds_between_lines
        self._start = self._logged = time.perf_counter()

    def __call__(self, done: int, total: Optional[int] = None) -> None:
        """
        Args:
            done: parts finished so far, > 0.
            total: parts in all, where the constructor was not told.
        """
        now = time.perf_counter()
        if now - self._logged < self._interval:
            return
        self._logged = now
        total = self._total if total is None else total
        assert total is not None, "give the total to the constructor or to the call"
        left = (now - self._start) / done * (total - done)
        self._logger.info(f"{self._what}: {done}/{total}, about {left:.0f} s left")
