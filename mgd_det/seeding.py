"""Seed random generators from the training's seed and the place in the training.

A key starts with a :class:`Purpose`, followed by the numbers listed there. Keys of different purposes never give the
same draws.
"""

import random
from contextlib import contextmanager
from enum import IntEnum
from typing import Iterator, Optional, Tuple

import numpy as np
import torch


class Purpose(IntEnum):
    """First number of a key. Each comment lists the numbers that follow it."""

    ORDER = 1  # building the loader and its sampler: seed
    SAMPLE = 2  # reading and augmenting one image: seed, position
    STEP = 3  # a training step of one rank: seed, iteration, rank
    MATCHING = 4  # a matching update on one rank: seed, iteration, rank
    INHERITING = 5  # measuring the teacher's channels: seed


def seed_generators(*key: int) -> None:
    """Seed the global generators of Python, numpy and torch, including those of all GPUs.

    Args:
        key: integers >= 0.
    """
    torch.manual_seed(_seed_all_but_torch(key))


@contextmanager
def seeded(*key: int, device: Optional[torch.device] = None) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch's CPU, and restore them at the end.

    Args:
        key: integers >= 0.
        device: a GPU whose generator is seeded and restored too. By default no GPU is touched: a data loader without
            workers runs between the draws that a training makes on its GPU.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=gpus):
        try:
            seed = _seed_all_but_torch(key)
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _seed_all_but_torch(key: Tuple[int, ...]) -> int:
    """Seed the generators of Python and numpy, and return the seed for torch's."""
    words = np.random.SeedSequence(key).generate_state(4)
    np.random.seed(words)
    random.seed(words.tobytes())
    return int(words[0]) << 31 | int(words[1]) >> 1  # 63 bits
