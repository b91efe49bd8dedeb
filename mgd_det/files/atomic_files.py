"""Files that are written whole or not at all."""

import contextlib
import logging
import os
import re
from typing import IO, Callable, List

# What a file is called while it is written: "<name>.<process id>.mgd_partial". It ends unlike any checkpoint.
_PARTIAL = re.compile(r".+\.\d+\.mgd_partial")

logger = logging.getLogger(__name__)


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file beside its place, flushes it to the disk, and only then gives it its name.

    Whatever fails, and at whatever moment the process is killed, ``path`` holds what it held before or all of the new
    content. After a kill a partial file may stay behind: see :func:`remove_partial_files`.

    Args:
        path: a local file; its folder is there.
        write: writes the content to the binary file that it is given.

    Raises what ``write`` and the file system raise; the partial file is gone then.
    """
    partial = f"{path}.{os.getpid()}.mgd_partial"
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
    _sync_folder(os.path.dirname(path) or ".")


def remove_partial_files(folder: str) -> List[str]:
    """Removes what killed processes left of :func:`write_atomically`; returns the files' names.

    No process may be writing to the folder at the same time.
    """
    removed = []
    for name in sorted(os.listdir(folder) if os.path.isdir(folder) else []):
        if _PARTIAL.fullmatch(name):
            try:
                os.remove(os.path.join(folder, name))
                removed.append(name)
            except OSError as e:
                logger.warning(f"{os.path.join(folder, name)}, the rest of a write that was cut short, stays: {e}")
    return removed


def _sync_folder(folder: str) -> None:
    """Makes a new name in the folder last through a power cut."""
    with contextlib.suppress(OSError):  # some network file systems do not sync folders; the file's content is safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
