"""Types of command-line arguments that several programs take."""

import argparse
import re
from typing import Tuple


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
