"""Files of strangers: the readers of this project run no code that a file brings, unless the user admits it."""

import argparse
import logging
import os
from typing import Any

from mgd_det.errors import UserError

# In the environment, so that processes which this one starts see it; no config file can set it.
ALLOW_UNSAFE_FILES = "MGD_DET_ALLOW_UNSAFE_FILES"

logger = logging.getLogger(__name__)


def allow_unsafe_files(allow: bool = True) -> None:
    """Whether this process, and those that it starts from now on, read files that can run code; at first, they do not.

    The flag ``--allow-unsafe-files`` of the programs calls it, and a caller from Python may.
    """
    os.environ[ALLOW_UNSAFE_FILES] = str(int(allow))


def unsafe_files_allowed() -> bool:
    """Whether :func:`allow_unsafe_files` was called, or ``MGD_DET_ALLOW_UNSAFE_FILES`` is 1 in the environment."""
    return os.environ.get(ALLOW_UNSAFE_FILES) == "1"


def refuse_unsafe(path: str, reason: str) -> None:
    """To be called before a file is read in a way that can run code.

    Args:
        path: of the file, for the warning.
        reason: what in it is unsafe, the beginning of a sentence: "it refers to posix.system".

    Raises UserError, but where unsafe files are allowed only a warning that names the file is logged.
    """
    if not unsafe_files_allowed():
        raise UserError(
            f"{reason}; reading that could run code. If you trust whoever made it, pass --allow-unsafe-files"
        )
    logger.warning(f"Reading {path} although {reason}; this can run code. --allow-unsafe-files admits it")


def add_unsafe_files_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow-unsafe-files``, which acts as it is parsed."""
    parser.add_argument(
        "--allow-unsafe-files",
        action=_AllowUnsafeFiles,
        nargs=0,
        help="also read weights and yaml configs that can run code as they are read: only where you trust their author",
    )


class _AllowUnsafeFiles(argparse.Action):
    def __call__(self, *_: Any, **__: Any) -> None:
        allow_unsafe_files()
