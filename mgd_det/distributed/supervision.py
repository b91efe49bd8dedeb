"""Watching the processes of this machine: when one fails, the others do not wait for it for ever."""

import logging
import os
import signal
import time
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Iterator, List, Sequence

from mgd_det.engine.hooks.interruption import EXIT_INTERRUPTED

logger = logging.getLogger(__name__)

# Seconds that the processes left have to end by themselves once one has failed, and again after SIGTERM.
GRACE = 10.0


def supervise(processes: Sequence[BaseProcess], grace: float = GRACE) -> int:
    """Waits until all processes have ended, and sees to it once one has failed.

    SIGTERM and SIGINT are passed on; the processes then end in their own time, as they may be saving, unless one ends
    otherwise than saved: those that wait for it would wait for ever.

    Args:
        grace: seconds that the others have to end by themselves after the first failure, and again after SIGTERM.

    Returns:
        The exit status of the first that failed, 128 + its number for a signal; 0 where all succeeded.
    """
    running, failed = list(processes), None
    deadline, ends = float("inf"), ["terminate", "kill"]
    with _passing_on_signals(processes) as received:
        while running:
            left = deadline - time.monotonic()
            connection.wait([p.sentinel for p in running], timeout=None if left == float("inf") else max(left, 0.0))
            for process in [p for p in running if not p.is_alive()]:
                running.remove(process)
                if process.exitcode == 0:
                    continue
                failed = failed or process
                is_saved = received and process.exitcode == EXIT_INTERRUPTED
                if deadline == float("inf") and len(ends) == 2 and not is_saved:
                    deadline = time.monotonic() + grace
            if running and time.monotonic() >= deadline and ends:
                how = ends.pop(0)
                for process in running:
                    getattr(process, how)()
                deadline = time.monotonic() + grace if ends else float("inf")
    if failed is None:
        return 0
    assert failed.exitcode is not None
    if failed.exitcode > 0:
        return failed.exitcode
    name = signal.Signals(-failed.exitcode).name
    if not received:
        hint = ": was the machine out of memory?" if name == "SIGKILL" else ""
        logger.error(f"error: process {list(processes).index(failed)} of this machine was ended by {name}{hint}")
    return 128 - failed.exitcode


@contextmanager
def _passing_on_signals(processes: Sequence[BaseProcess]) -> Iterator[List[int]]:
    """Gives the list of the signals that were received so far."""
    received: List[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
