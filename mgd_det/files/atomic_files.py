"""Files and folders that are written whole or not at all."""

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import IO, Callable, Iterator, List

# Name of a file while it is written: "<name>.<process id>.mgd_partial". It ends unlike any checkpoint.
_PARTIAL = re.compile(r".+\.\d+\.mgd_partial")

logger = logging.getLogger(__name__)


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, flush it to the disk, and only then give it its name.

    If writing fails or the process is killed at any moment, ``path`` holds either its former content or all of the
    new content. After a kill, a partial file may remain: see :func:`remove_partial_files`.

    Args:
        path: a local file; its folder must exist.
        write: writes the content to the binary file that it receives.

    Raises:
        Exception: of ``write`` or of the file system. The partial file is removed first.
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
    """Remove what killed processes left of :func:`write_atomically`, and return the names of these files.

    No process may be writing to the folder at the same time.
    """
    removed = []
    for name in sorted(os.listdir(folder) if os.path.isdir(folder) else []):
        if _PARTIAL.fullmatch(name):
            try:
                os.remove(os.path.join(folder, name))
                removed.append(name)
            except OSError as e:
                logger.warning(f"Cannot remove {os.path.join(folder, name)}, left by an interrupted write: {e}")
    return removed


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a hidden folder beside ``path``; it becomes ``path`` when the ``with`` block ends without an error.

    A folder that was at ``path`` is replaced then. After an error or Ctrl-C it is still there, unchanged, and the
    hidden folder is removed.

    Args:
        path: absolute. Its parents are created.

    Yields:
        The empty folder to fill.
    """
    partial, old = (path.with_name(f".{path.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        replaced = path.exists()
        if replaced:
            path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            if replaced:
                old.rename(path)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: str) -> None:
    """Make a new name in the folder survive a power cut."""
    with contextlib.suppress(OSError):  # some network file systems cannot sync folders; the file's content is safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
