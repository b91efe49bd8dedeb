"""Types of command-line arguments that several programs take."""

import argparse


def positive(text: str) -> int:
    """Parse a whole number > 0, as the ``type`` of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number > 0")
    return number
