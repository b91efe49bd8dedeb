"""The choice of channels and the folding of dropped ones, against numpy's least squares and brute force."""

import itertools

import numpy as np
import pytest
import torch

from mgd_det.errors import ArgumentError
from mgd_det.matching.channel_selection import CRITERIA, Consumer, fold_dropped, relative_error, select_channels


def made(channels=7, outputs=(4, 3), positions=2, pixels=200, seed=0):
    """Random consumers of correlated inputs: (inputs (pixels, C), weights (O, C, P)) of each."""
    rng = np.random.default_rng(seed)
    parts = []
    for number in outputs:
        inputs = rng.standard_normal((pixels, channels)) @ rng.standard_normal((channels, channels))
        parts.append((inputs, rng.standard_normal((number, channels, positions))))
    return parts


def consumers_of(parts):
    moments = [inputs.T @ inputs / len(inputs) for inputs, _ in parts]
    return [Consumer(torch.tensor(weight), torch.tensor(moment)) for (_, weight), moment in zip(parts, moments)]


def error_of(inputs, weight, kept, compensate=True):
    """Relative squared error of the outputs, computed pixel by pixel, with numpy's least squares."""
    rebuilt = np.zeros_like(inputs)
    rebuilt[:, kept] = inputs[:, kept]
    if compensate:
        rebuilt = inputs[:, kept] @ np.linalg.lstsq(inputs[:, kept], inputs, rcond=None)[0]
    outputs, wrong = (np.einsum("ocp,nc->nop", weight, x) for x in (inputs, inputs - rebuilt))
    return (wrong**2).sum() / (outputs**2).sum()


def scores(parts, criterion):
    total = 0
    for inputs, weight in parts:
        energy, norm = (inputs**2).mean(axis=0), (weight**2).sum(axis=(0, 2))
        score = {"energy": energy, "weight": norm, "energy_weight": energy * norm}[criterion]
        total = total + score / score.sum()
    return total


@pytest.mark.parametrize("criterion", ["energy", "weight", "energy_weight"])
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_shares_summed_over_the_consumers(criterion, seed):
    parts = made(seed=seed)
    expected = np.sort(np.argsort(-scores(parts, criterion))[:3])
    assert select_channels(consumers_of(parts), 3, criterion).tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_reconstruction_takes_in_each_step_the_channel_that_lowers_the_error_most(seed):
    parts = made(seed=seed)
    kept = []
    for _ in range(4):
        errors = {c: sum(error_of(*part, [*kept, c]) for part in parts) for c in range(7) if c not in kept}
        kept.append(min(errors, key=errors.get))
        assert select_channels(consumers_of(parts), len(kept)).tolist() == sorted(kept)


def test_the_criteria_differ_where_they_should():
    # Channel 0 is loud and unread, 1 and 2 are alike, 3 is quiet, independent and read.
    rng = np.random.default_rng(1)
    base = rng.standard_normal((500, 4)) * [9, 2, 0, 1]
    base[:, 2] = base[:, 1] * 1.01
    weight = np.array([[[0.01], [1.0], [1.0], [1.2]], [[0.0], [0.5], [-0.2], [-0.1]]])
    consumers = consumers_of([(base, weight)])
    chosen = {criterion: select_channels(consumers, 2, criterion).tolist() for criterion in CRITERIA[:4]}
    assert chosen["energy"] in ([0, 1], [0, 2]) and chosen["energy_weight"] == [1, 2]
    assert chosen["weight"] == [1, 3] and chosen["reconstruction"] in ([1, 3], [2, 3])


def test_the_error_is_that_of_the_outputs():
    parts = made()
    consumers, kept = consumers_of(parts), [1, 4, 5]
    for compensate in (True, False):
        expected = np.mean([error_of(*part, kept, compensate) for part in parts])
        assert relative_error(consumers, torch.tensor(kept), compensate) == pytest.approx(expected, rel=1e-6)
    best = min(itertools.combinations(range(7), 3), key=lambda k: sum(error_of(*p, list(k)) for p in parts))
    greedy = relative_error(consumers, select_channels(consumers, 3), True)
    assert relative_error(consumers, torch.tensor(best), True) <= greedy <= expected
    assert relative_error([Consumer(consumers[0].weight)], torch.tensor(kept), True) is None


def test_folding_is_least_squares():
    ((inputs, weight),) = made(outputs=(4,))
    kept = torch.tensor([0, 3, 6])
    ours = fold_dropped(torch.tensor(weight), torch.tensor(inputs.T @ inputs / len(inputs)), kept).numpy()
    outputs = np.einsum("ocp,nc->nop", weight, inputs).reshape(len(inputs), -1)
    best = np.linalg.lstsq(inputs[:, kept.numpy()], outputs, rcond=None)[0]
    np.testing.assert_allclose(ours.transpose(1, 0, 2).reshape(3, -1), best, rtol=1e-6)


def test_folding_is_exact_where_dropped_channels_are_combinations_of_kept_ones_and_copes_with_silent_ones():
    rng = np.random.default_rng(2)
    kept, mix = [1, 2, 5], rng.standard_normal((3, 7))
    mix[:, kept] = np.eye(3)
    inputs = rng.standard_normal((300, 3)) @ mix
    inputs[:, [5, 0]] = 0  # a kept and a dropped channel that are always zero
    inputs[:, [3, 4, 6]] = inputs[:, [1, 2]] @ mix[:2][:, [3, 4, 6]]
    weight = rng.standard_normal((4, 7, 3))
    folded = fold_dropped(torch.tensor(weight), torch.tensor(inputs.T @ inputs / 300), torch.tensor(kept)).numpy()
    expected = np.einsum("ocp,nc->nop", weight, inputs)
    np.testing.assert_allclose(np.einsum("ocp,nc->nop", folded, inputs[:, kept]), expected, atol=1e-6)
    np.testing.assert_allclose(folded[:, 2], weight[:, 5])  # nothing is known of it
    assert folded.dtype == np.float64
    assert fold_dropped(torch.tensor(weight).float(), torch.eye(7), torch.tensor(kept)).dtype == torch.float32


@pytest.mark.parametrize("criterion", CRITERIA)
def test_as_many_channels_of_each_block_stay(criterion):
    parts = made(channels=12, seed=3)
    kept = select_channels(consumers_of(parts), 6, criterion, blocks=3, seed=5)
    assert kept.dtype == torch.long and kept.tolist() == sorted(set(kept.tolist()))
    assert [sum(4 * b <= k < 4 * b + 4 for k in kept.tolist()) for b in range(3)] == [2, 2, 2]
    if criterion in ("energy", "weight", "energy_weight"):
        score = scores(parts, criterion).reshape(3, 4)
        assert kept.tolist() == sorted((np.argsort(-score)[:, :2] + [[0], [4], [8]]).ravel().tolist())


def test_what_was_not_measured_is_chosen_by_weight_and_random_by_its_seed():
    parts = made()
    unmeasured = [Consumer(torch.tensor(weight)) for _, weight in parts]
    assert torch.equal(select_channels(unmeasured, 3, "reconstruction"), select_channels(unmeasured, 3, "weight"))
    draws = {tuple(select_channels(unmeasured, 3, "random", seed=seed).tolist()) for seed in range(20)}
    assert len(draws) > 5 and torch.equal(*(select_channels(unmeasured, 3, "random", seed=4) for _ in range(2)))


def test_all_channels_are_kept_where_fewer_explain_all():
    inputs = np.outer(np.arange(1, 50), [1.0, 2.0, 0.0, 3.0])
    consumers = consumers_of([(inputs, np.ones((2, 4, 1)))])
    assert select_channels(consumers, 4).tolist() == [0, 1, 2, 3]
    assert select_channels(consumers, 2).tolist() in ([0, 3], [1, 3])  # one explains all, the next is loud


@pytest.mark.parametrize("count, blocks", [(0, 1), (8, 1), (3, 2), (2, 2)])
def test_numbers_that_do_not_divide_are_named(count, blocks):
    with pytest.raises(ArgumentError, match=f"count is {count} of 7 channels in {blocks} blocks"):
        select_channels(consumers_of(made()), count, blocks=blocks)
    with pytest.raises(ArgumentError, match="criterion is 'best'.*energy_weight"):
        select_channels(consumers_of(made()), 2, "best")
