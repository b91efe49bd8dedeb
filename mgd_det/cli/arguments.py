"""Command-line arguments that several programs take, and their types."""

import argparse
import os
import re
from typing import Sequence, Tuple

from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import add_unsafe_files_flag


def positive(text: str) -> int:
    """Parse a whole number > 0, as the ``type`` of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number > 0")
    return number


def image_size(text: str) -> Tuple[int, int]:
    """Read "HxW", an argument's ``type``."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    height, width = map(int, match.groups()) if match else (0, 0)
    if min(height, width) < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size HxW of at least 32x32")
    return height, width


def named_file(text: str) -> Tuple[str, str]:
    """Return the name and the path of NAME=FILE, or of FILE, whose name is its own without the suffix.

    It is an argument's ``type``.
    """
    name, equals, file = text.rpartition("=")
    # An "=" may be part of a folder's name.
    if not equals or "/" in name or os.path.exists(text):
        name, file = os.path.splitext(os.path.basename(text))[0], text
    if not name or ", " in name:
        raise argparse.ArgumentTypeError(f"the name {name!r} of {file!r} is empty or has a comma and a space")
    return name, file


def add_comparison_flags(parser: argparse.ArgumentParser, rounds: int, of: str = "") -> None:
    """Add the arguments of a program that measures several detectors in turns.

    Args:
        rounds: the default of --rounds.
        of: what a config must be of, for the help.
    """
    parser.add_argument(
        "--config-file",
        required=True,
        action="append",
        type=named_file,
        metavar="[NAME=]FILE",
        help=f"{of}repeat it to compare with the first (NAME: the file's own, without .yaml)",
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=rounds, metavar="N", help="default: %(default)s")
    add_unsafe_files_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of all configs: KEY VALUE ...")


def check_names(flag: str, named: Sequence[Tuple[str, str]]) -> None:
    """Check that detectors, each a :func:`named_file`, have different names.

    Raises:
        UserError: two have the same.
    """
    names = [name for name, _ in named]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{flag}: two detectors have the name {twice[0]!r}: give NAME=FILE to one of them")
