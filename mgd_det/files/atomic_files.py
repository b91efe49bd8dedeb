"""Files and folders that are written whole or not at all."""

import contextlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import IO, Callable, Iterator, List

# While a file is written, it is "<name>.<process id>.mgd_partial", which no reader takes for a checkpoint.
_PARTIAL = re.compile(r".+\.\d+\.mgd_partial")

logger = logging.getLogger(__name__)


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under another name, flush it to the disk, and only then rename it to ``path``.

    If writing fails or the process is killed, ``path`` has either its old content or all of the new content. After a
    kill, a partial file may remain: see :func:`remove_partial_files`.

    Args:
        path: a local file. Its folder must exist.
        write: writes the content to the binary file that it receives.

    Raises:
        Exception: raised by ``write`` or the file system. The partial file is removed first.
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


def write_text_atomically(path: str, text: str) -> None:
    """Write a text in UTF-8 as :func:`write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def remove_partial_files(folder: str) -> List[str]:
    """Remove the partial files that killed processes left in a folder, and return their names.

    No process may write to the folder at the same time.
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
    """Give the ``with`` block an empty folder, which becomes ``path`` if the block ends without an error.

    It replaces a folder at ``path``. After an error or Ctrl-C, that folder is unchanged and the new one is removed.

    Args:
        path: absolute. Its parents are created.

    Yields:
        The empty folder to fill. It is in a hidden folder beside ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as hidden:
        partial, old = Path(hidden, "partial"), Path(hidden, "old")
        partial.mkdir()
        yield partial
        if path.exists():
            path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise


def _sync_folder(folder: str) -> None:
    """Make a new name in the folder survive a power cut."""
    with contextlib.suppress(OSError):  # some network file systems cannot sync folders; the file's content is safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
