"""Random generators as functions of a seed and of a place in the training.

A key is a purpose of :class:`Purpose`, the training's seed, and what counts within that purpose: keys of different
purposes never give the same draws.
"""

import random
from contextlib import contextmanager
from enum import IntEnum
from typing import Iterator, Tuple

import numpy as np
import torch


class Purpose(IntEnum):
    """First number of a key."""

    ORDER = 1  # the making of loader and sampler; key: seed
    SAMPLE = 2  # reading and augmenting one image; key: seed, position
    STEP = 3  # a training step of one rank; key: seed, iteration, rank


def seed_generators(*key: int) -> None:
    """Seeds python's, numpy's and torch's global generators, those of all of torch's devices included.

    Args:
        key: integers >= 0.
    """
    torch.manual_seed(_seed_but_torch(key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within it the global generators of the CPU (python's, numpy's, torch's) are seeded; then they are as before.

    A GPU's generator is left alone: a data loader without workers runs between a training's draws from it.

    Args:
        key: integers >= 0.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(_seed_but_torch(key))
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _seed_but_torch(key: Tuple[int, ...]) -> int:
    """Seeds python's and numpy's generators; returns the seed for torch's."""
    words = np.random.SeedSequence(key).generate_state(4)
    np.random.seed(words)
    random.seed(words.tobytes())
    return int(words[0]) << 31 | int(words[1]) >> 1  # 63 bits
