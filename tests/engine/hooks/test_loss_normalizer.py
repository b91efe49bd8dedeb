"""What dense detectors divide their losses by is a number of each rank, and every rank gets its own back."""

import pytest
import torch
from torch import nn

from mgd_det.engine.hooks.loss_normalizer import LossNormalizer


def detector(normalizer=None):
    model = nn.Linear(1, 1)
    if normalizer is not None:
        model.loss_normalizer = normalizer
    return model


def loaded(state):
    model = detector(100.0)
    LossNormalizer(model).load_state_dict(state)
    return getattr(model, "loss_normalizer", None)


def test_one_process_gets_its_number_back():
    hook = LossNormalizer(detector(3.5))
    hook.after_step()
    assert hook.state_dict() == {"loss_normalizer": 3.5}
    assert loaded({"loss_normalizer": 3.5}) == 3.5


def test_a_detector_without_one():
    hook = LossNormalizer(detector())
    hook.after_step()
    assert hook.state_dict() == {}
    assert loaded({}) is None


def test_every_rank_gets_its_own_back(run_ranks):
    def rank_saves(rank):
        hook = LossNormalizer(detector(10.0 + rank))
        hook.after_step()
        state = hook.state_dict()
        return state, loaded(state)

    (state, first), (_, second) = run_ranks(rank_saves, 2)
    assert state == {"loss_normalizer": [10.0, 11.0]}
    assert (first, second) == (10.0, 11.0)
    # Of two ranks to one, and of one to two.
    assert loaded(state) == 10.5
    assert run_ranks(lambda rank: loaded({"loss_normalizer": 7.0}), 2) == [7.0, 7.0]


@pytest.mark.parametrize("value", [torch.tensor(2.0), 2])
def test_what_is_saved_is_a_plain_number(value):
    assert LossNormalizer(detector(value)).state_dict() == {"loss_normalizer": 2.0}
