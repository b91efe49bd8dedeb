"""The permission to read files that can run code. Without it, the readers of this project refuse them."""

import argparse
import logging
import os
from typing import Any

from mgd_det.errors import UserError

# In the environment, so that child processes see it and no config file can set it.
ALLOW_UNSAFE_FILES = "MGD_DET_ALLOW_UNSAFE_FILES"

logger = logging.getLogger(__name__)


def allow_unsafe_files(allow: bool = True) -> None:
    """Allow or forbid this process, and those that it starts later, to read files that can run code.

    The default is to forbid it. The flag ``--allow-unsafe-files`` of the programs calls this function.
    """
    os.environ[ALLOW_UNSAFE_FILES] = str(int(allow))


def unsafe_files_allowed() -> bool:
    """Return whether unsafe files are allowed, by :func:`allow_unsafe_files` or ``MGD_DET_ALLOW_UNSAFE_FILES=1``."""
    return os.environ.get(ALLOW_UNSAFE_FILES) == "1"


def refuse_unsafe(path: str, reason: str) -> None:
    """Refuse an unsafe file, or log a warning if unsafe files are allowed. Call it before reading the file.

    Args:
        path: the file, for the warning.
        reason: what is unsafe, as the start of a sentence: "it refers to posix.system".

    Raises:
        UserError: unsafe files are not allowed.
    """
    if not unsafe_files_allowed():
        raise UserError(f"{reason}; reading it could run code. If you trust its author, pass --allow-unsafe-files")
    logger.warning(f"Reading {path} although {reason}; this can run code. --allow-unsafe-files allows it")


def add_unsafe_files_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-unsafe-files``, which takes effect when it is parsed."""
    parser.add_argument(
        "--allow-unsafe-files",
        action=_AllowUnsafeFiles,
        nargs=0,
        help="also read weights and yaml configs that can run code. Use it only if you trust their authors",
    )


class _AllowUnsafeFiles(argparse.Action):
    def __call__(self, *_: Any, **__: Any) -> None:
        allow_unsafe_files()
