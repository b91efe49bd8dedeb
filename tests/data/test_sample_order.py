"""The order of samples against Detectron2's own samplers and grouping."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from torch.utils.data import Sampler

from mgd_det.data.sample_order import SampleOrder
from mgd_det.errors import UserError

SIZE = 23
WIDE = np.random.default_rng(0).random(SIZE) < 0.7
SAMPLERS = {
    "training": lambda: TrainingSampler(SIZE, seed=3),
    "in order": lambda: TrainingSampler(SIZE, shuffle=False, seed=3),
    "repeat factor": lambda: RepeatFactorTrainingSampler(torch.linspace(1, 2.5, SIZE), seed=3),
    "subset": lambda: RandomSubsetTrainingSampler(SIZE, 0.5, seed_shuffle=3, seed_subset=4),
}


class OwnSampler(Sampler):
    """Not Detectron2's: of this rank alone."""

    def __init__(self):
        pass

    def __iter__(self):
        return itertools.cycle(range(5, SIZE))


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return SAMPLERS[request.param]()


def take(order, batches):
    return list(itertools.islice(order, batches))


def test_a_batch_holds_the_samplers_next_indices_with_their_positions(sampler):
    batches = take(SampleOrder(sampler, 4), 20)
    assert [len(batch) for batch in batches] == [4] * 20
    assert list(itertools.chain(*batches)) == list(enumerate(itertools.islice(sampler, 80)))


def test_groups_are_those_of_detectron2s_loader(sampler):
    entries = ({"width": 1 + WIDE[i], "height": 1, "sample": (n, i)} for n, i in enumerate(sampler))
    expected = [[entry["sample"] for entry in batch] for batch in take(AspectRatioGroupedDataset(entries, 4), 30)]
    batches = take(SampleOrder(sampler, 4, WIDE), 30)
    assert batches == expected
    assert {bool(WIDE[batch[0][1]]) for batch in batches} == {True, False}


@pytest.mark.parametrize("start, is_wide", [(1, WIDE), (7, None), (50, WIDE)])
def test_a_start_leaves_out_as_many_batches(sampler, start, is_wide):
    whole = take(SampleOrder(sampler, 4, is_wide), start + 10)
    assert take(SampleOrder(sampler, 4, is_wide, start=start), 10) == whole[start:]


@pytest.mark.parametrize("ranks, is_wide", [(2, WIDE), (3, None), (6, WIDE)])
def test_the_ranks_share_the_batches_of_one_process(sampler, ranks, is_wide, monkeypatch):
    alone = take(SampleOrder(sampler, 6, is_wide, start=2), 15)
    shares = []
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        shares.append(take(SampleOrder(sampler, 6, is_wide, start=2), 15))
    for batch, *parts in zip(alone, *shares):
        assert [len(part) for part in parts] == [6 // ranks] * ranks
        assert sorted(itertools.chain(*parts)) == sorted(batch)


def test_ranks_of_detectron2s_samplers_have_their_samplers_indices(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    sampler = TrainingSampler(SIZE, seed=3)
    indices = [index for batch in take(SampleOrder(sampler, 6), 20) for _, index in batch]
    assert indices == list(itertools.islice(sampler, 60))


@pytest.mark.parametrize("is_wide", [None, WIDE])
def test_another_sampler_gives_its_ranks_indices_alone(is_wide, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    positions = set()
    for rank in range(3):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        whole = take(SampleOrder(OwnSampler(), 6, is_wide), 12)
        assert take(SampleOrder(OwnSampler(), 6, is_wide, start=4), 8) == whole[4:]
        assert all(len(batch) == 2 for batch in whole)
        for position, index in itertools.chain(*whole):
            assert position % 3 == rank and index == 5 + position // 3 % (SIZE - 5)
            positions.add(position)
    assert len(positions) == 3 * 12 * 2


def test_a_sampler_that_ends_drops_its_last_incomplete_batch():
    assert take(SampleOrder(range(7), 3), 9) == [[(0, 0), (1, 1), (2, 2)], [(3, 3), (4, 4), (5, 5)]]


@pytest.mark.parametrize("size", [0, 3, -2])
def test_a_batch_that_the_ranks_cannot_share(size, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    with pytest.raises(UserError, match=f"SOLVER.IMS_PER_BATCH .* is {size}: give a multiple .* 2$"):
        SampleOrder(TrainingSampler(SIZE, seed=3), size)


@pytest.mark.parametrize("is_wide", [None, WIDE])
@pytest.mark.parametrize("sizes", [(6, 4), (4, 12), (8, 2)])
def test_another_batch_size_continues_after_the_last_image(sampler, sizes, is_wide):
    old, new = sizes
    before = take(SampleOrder(sampler, old, is_wide), 7)
    order = SampleOrder(sampler, new, is_wide, start=0, earlier=[(7, old)])
    after = take(order, 40)
    assert [len(batch) for batch in after] == [new] * 40
    positions = [position for batch in before + after for position, _ in batch]
    assert len(set(positions)) == len(positions)  # no image is repeated
    # Every image up to the last is in a batch, except those of a group that is not full yet.
    missing = set(range(max(positions))) - set(positions)
    assert len(missing) < (1 if is_wide is None else max(sizes))
    assert take(SampleOrder(sampler, new, is_wide, start=5, earlier=[(7, old)]), 10) == after[5:15]
    if is_wide is not None:
        assert all(len({bool(WIDE[index]) for _, index in batch}) == 1 for batch in after)


@pytest.mark.parametrize("is_wide", [None, WIDE])
def test_several_changes_of_the_batch_size(is_wide):
    sampler = SAMPLERS["training"]()
    first = take(SampleOrder(sampler, 4, is_wide), 3)
    second = take(SampleOrder(sampler, 6, is_wide, earlier=[(3, 4)]), 5)
    third = take(SampleOrder(sampler, 2, is_wide, earlier=[(3, 4), (5, 6)]), 30)
    positions = [position for batch in first + second + third for position, _ in batch]
    assert len(set(positions)) == len(positions)
    assert set(range(20)) <= set(positions)
