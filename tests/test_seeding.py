import random

import numpy as np
import pytest
import torch

from mgd_det.seeding import Purpose, seed_generators, seeded


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_equal_keys_give_equal_draws_and_others_do_not():
    keys = [(purpose, *rest) for purpose in Purpose for rest in ((0,), (0, 1), (1, 0), (0, 2**40))]
    seen = {}
    for key in keys:
        with seeded(*key):
            seen[key] = draws()
        with seeded(*key):
            assert draws() == seen[key]
        seed_generators(*key)
        assert draws() == seen[key]
    for generator in zip(*(seen[key] for key in keys)):
        assert len(set(generator)) == len(keys)


def test_the_generators_go_on_as_if_nothing_had_been_drawn():
    seed_generators(7)
    expected = [draws() for _ in range(3)]
    seed_generators(7)
    seen = [draws()]
    with seeded(1, 2):
        draws()
    seen.append(draws())
    with pytest.raises(ZeroDivisionError), seeded(1, 2):
        draws()
        raise ZeroDivisionError
    seen.append(draws())
    assert seen == expected
