"""Kinds of command-line arguments that several programs take."""

import argparse


def positive(text: str) -> int:
    """An argument's ``type``: a whole number > 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number > 0")
    return number
