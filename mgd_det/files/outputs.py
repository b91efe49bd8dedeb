"""Places that a program writes to: checked before its work starts."""

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
        flag: the flag or config key that names it, such as "--output-dir".

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as e:
        raise UserError(f"{flag} {path} cannot be written: {e}. Give another path, or change its permissions.") from e


def writable_folder(path: str, flag: str) -> str:
    """Create a folder where it does not exist, and check that files can be written to it.

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
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def writable_file(path: str, flag: str) -> str:
    """Check that a file can be written, as :func:`writable_folder` does. A file at ``path`` keeps its content."""
    existed = os.path.exists(path)
    with writing(path, flag), open(path, "ab"):
        pass
    if not existed:
        os.remove(path)
    return path
