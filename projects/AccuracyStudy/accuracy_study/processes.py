"""A training program in a process of its own, with its output in a file."""

import os
import re
import subprocess
import time
from pathlib import Path
from typing import List, Optional, Sequence

_ITERATION = re.compile(rb"  iter: (\d+)  ")
_TAIL_BYTES = 8192


class LoggedProcess:
    """A running program.

    Attributes:
        log: the file with its output.
    """

    def __init__(self, command: Sequence[str], log: Path, append: bool = False) -> None:
        """
        Args:
            command: program and arguments.
            log: written by the program.
            append: whether the file keeps its content.
        """
        self.log = log
        self._iteration = 0
        with open(log, "ab" if append else "wb") as file:
            # One thread each: several side by side use the cores better than one with several threads. A session of
            # its own: Ctrl-C reaches the runner only, which then ends its processes one by one.
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def status(self) -> Optional[int]:
        """Return the exit status, or None while it runs."""
        return self._process.poll()

    def iteration(self) -> int:
        """Return the last iteration of the training that a call has seen in the log; 0 before the first."""
        found = _ITERATION.findall(self._tail())
        if found:  # otherwise the end of the log is of an evaluation
            self._iteration = int(found[-1]) + 1
        return self._iteration

    def last_lines(self, number: int = 15) -> List[str]:
        """Return the end of the log."""
        return self._tail().decode("utf-8", errors="replace").splitlines()[-number:]

    def _tail(self) -> bytes:
        with open(self.log, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return file.read()


def stop(processes: Sequence[LoggedProcess], seconds: float = 60.0) -> None:
    """End processes by SIGTERM, which a training answers by a checkpoint; kill those that need longer than that."""
    for process in processes:
        process._process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process._process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process._process.kill()
            process._process.wait()
