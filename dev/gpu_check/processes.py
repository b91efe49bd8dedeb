"""Programs side by side, each with a time limit; one that hangs or crashes affects no other."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

_GRACE_SECONDS = 5.0  # from SIGTERM, by which a program may end its own, to SIGKILL


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: exit status, negative for a signal; None if its time was over.
        seconds: how long it ran.
    """

    status: Optional[int]
    seconds: float


def run_side_by_side(
    commands: Mapping[str, Tuple[Sequence[str], float]],
    logs: Mapping[str, Path],
    environment: Mapping[str, str],
    folder: Path,
    workers: Optional[int] = None,
) -> Iterator[Tuple[str, Outcome]]:
    """Run programs until all have ended or have used up their time.

    Args:
        commands: by name, the command line and the seconds that it may take. They start in this order.
        logs: by name, the file for its output.
        environment: variables besides those of this process.
        folder: where they run.
        workers: how many run at the same time; None for all.

    Yields:
        The name of a program and how it ended, as soon as it has.
    """
    waiting = list(commands)
    running: Dict[str, Tuple[subprocess.Popen, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (workers or len(commands)):
                name = waiting.pop(0)
                with open(logs[name], "wb") as log:
                    process = subprocess.Popen(
                        commands[name][0],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **environment},
                        cwd=folder,
                        start_new_session=True,
                    )
                running[name] = process, time.monotonic()
            time.sleep(0.05)
            for name, (process, start) in list(running.items()):
                is_late = process.poll() is None and time.monotonic() - start > commands[name][1]
                if is_late:
                    end_with_children(process)
                if process.poll() is not None:
                    del running[name]
                    yield name, Outcome(None if is_late else process.returncode, time.monotonic() - start)
    finally:
        for process, _ in running.values():
            end_with_children(process)


def end_with_children(process: subprocess.Popen) -> None:
    """End a program and all that it has started, also what runs in a session of its own."""
    family = descendants(process.pid)
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        family |= descendants(process.pid)
        process.kill()
        process.wait()
    for pid, started in family:
        # A number may belong to another program by now.
        if _start_time(pid) == started:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def descendants(pid: int) -> Set[Tuple[int, str]]:
    """Return the processes below one, each with its start time (Linux; elsewhere none)."""
    found: Set[Tuple[int, str]] = set()
    waiting: List[int] = [pid]
    while waiting:
        parent = waiting.pop()
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                children = [int(child) for child in path.read_text().split()]
            except OSError:  # it has ended
                continue
            found |= {(child, _start_time(child)) for child in children}
            waiting += children
    return found


def _start_time(pid: int) -> str:
    try:
        # The name before the last bracket may have spaces; the start is field 22 (man 5 proc).
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
