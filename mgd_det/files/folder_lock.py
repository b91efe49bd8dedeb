"""A lock on an output folder, so that two runs do not write to it at the same time."""

import logging
import os
import socket
from contextlib import suppress
from typing import IO, Dict, Tuple

from mgd_det.errors import UserError
from mgd_det.files.outputs import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"

logger = logging.getLogger(__name__)

# The open files of this process's locks, by process id (a forked process has none of them) and folder.
_held: Dict[Tuple[int, str], IO[str]] = {}


def lock_folder(folder: str, key: str) -> None:
    """Create a folder and lock it until this process ends, however it ends.

    Locking it again in the same process has no effect. Remote folders, and file systems without locks, are not locked.

    Args:
        folder: where the run writes.
        key: the config key that names it, such as "OUTPUT_DIR".

    Raises:
        UserError: another process has locked the folder, or it cannot be written.
    """
    if "://" in folder or fcntl is None:
        return
    holder = os.getpid(), os.path.realpath(folder)
    if holder in _held:
        return
    path = os.path.join(folder, LOCK_FILE)
    with writing(folder, key):
        os.makedirs(folder, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (closing it would release the lock)
    try:
        _lock(file, folder, key)
    except OSError as e:
        logger.warning(f"{path} cannot be locked ({e}): make sure that no other run writes to {folder}")
    else:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
    _held[holder] = file


def refuse_locked_folder(folder: str, key: str) -> None:
    """Check that no other process has locked a folder, before something is written that its run needs.

    Args:
        folder: as for :func:`lock_folder`; it need not exist.
        key: the config key or flag that names it.

    Raises:
        UserError: another process has locked the folder.
    """
    path = os.path.join(folder, LOCK_FILE)
    if fcntl is None or (os.getpid(), os.path.realpath(folder)) in _held or not os.path.isfile(path):
        return
    # A lock that cannot be tried is no reason to stop: lock_folder warns of it.
    with suppress(OSError), open(path, "a+") as file:
        _lock(file, folder, key)


def _lock(file: IO[str], folder: str, key: str) -> None:
    try:
        # Not flock(): its locks live on in the workers that a killed process leaves behind.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        other = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{key} {folder} is in use by another run, process {other}: give this run another {key}, or end that "
            "process first. Two runs in one folder would overwrite each other's checkpoints"
        ) from None
