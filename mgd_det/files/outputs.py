"""Checks of a program's outputs before its work starts."""

import os
import tempfile
from contextlib import contextmanager
from typing import Iterator

from mgd_det.errors import UserError


@contextmanager
def writing(path: str, flag: str) -> Iterator[None]:
    """Turn an OSError of the ``with`` block into a UserError that names the output.

    Args:
        path: the file or folder that the user named.
        flag: the flag or config key of the path, such as "--output-dir".

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except FileNotFoundError as e:
        folder = os.path.dirname(os.path.abspath(path))
        raise UserError(f"{flag} {path} cannot be written: there is no folder {folder}. Make it first.") from e
    except OSError as e:
        raise UserError(f"{flag} {path} cannot be written: {e}. Give another path, or change its permissions.") from e


def writable_folder(path: str, flag: str) -> str:
    """Create a folder if it does not exist, and check that files can be written to it.

    Args:
        path: the folder.
        flag: as in :func:`writing`.

    Returns:
        ``path``.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    with writing(path, flag):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    return path


def writable_file(path: str, flag: str) -> str:
    """Check that a file can be written. A file at ``path`` keeps its content.

    Arguments, result and error are those of :func:`writable_folder`.
    """
    existed = os.path.exists(path)
    with writing(path, flag), open(path, "ab"):
        pass
    if not existed:
        os.remove(path)
    return path
