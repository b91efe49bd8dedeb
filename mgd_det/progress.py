"""Progress of long work in the log: how much is done, and about how long the rest takes."""

import logging
import time

_SECONDS_BETWEEN_LINES = 10


class ProgressLog:
    """Logs at most every ten seconds. Call it after each part.

    Example:
        >>> progress = ProgressLog(logging.getLogger(__name__), "Reading images")
        >>> for done, path in enumerate(paths, start=1):
        ...     read(path)
        ...     progress(done, len(paths))
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        """
        Args:
            what: the work, the beginning of the line: "Reading images".
        """
        self._logger, self._what = logger, what
        self._start = self._logged = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """
        Args:
            done: parts finished so far, > 0.
            total: parts in all.
        """
        now = time.perf_counter()
        if now - self._logged < _SECONDS_BETWEEN_LINES:
            return
        self._logged = now
        left = (now - self._start) / done * (total - done)
        self._logger.info(f"{self._what}: {done}/{total}, about {left:.0f} s left")
