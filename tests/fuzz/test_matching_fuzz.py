"""The cost of channels and its assignment, of any numbers of channels and any features."""

import itertools

import numpy as np
import pytest
import torch
from fuzz.budget import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import linprog

from mgd_det.matching import ChannelCost, assign_channels, matched_cost

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FEW = st.integers(1, 6)


@st.composite
def features(draw, channels):
    """(B, C, H, W) for each of ``channels``: random, with constant and zero channels, one memory layout or another."""
    images, height, width = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype, scale = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1.0, 1e-3, 1e3]))
    maps = []
    for number in channels:
        values = rng.normal(size=(images, number, height, width)) * scale
        kind = rng.integers(0, 5, size=number)
        values[:, kind == 0] = 0
        values[:, kind == 1] = scale
        values[:, kind == 2] = values[:, :1]  # equal channels: costs tie
        maps.append(_laid_out(torch.from_numpy(values).to(dtype), draw(st.integers(0, 2))))
    return maps


def _laid_out(x, layout):
    if layout == 1:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 2:  # every second pixel of a wider map
        wide = torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def reference_cost(batches):
    """Distances as the paper defines them, an image and a pair of channels at a time, in float64."""
    distances = []
    for student, teacher in batches:
        for s, t in zip(student.double().numpy(), teacher.double().numpy()):
            units = [[x / np.linalg.norm(x) if x.any() else x for x in net.reshape(len(net), -1)] for net in (s, t)]
            distances.append([[2 - 2 * a @ b for b in units[1]] for a in units[0]])
    return np.mean(distances, axis=0)


@pytest.mark.slow
@examples(ci=60, nightly=1500)
@given(data=st.data(), student=FEW, teacher=FEW)
def test_cost(data, student, teacher):
    batches = [data.draw(features((student, teacher))) for _ in range(data.draw(st.integers(1, 2)))]
    cost = ChannelCost(student, teacher)
    for batch in batches:
        cost.update(*batch)
    if cost.num_images == 0:
        with pytest.raises(ValueError, match="no image"):
            cost.mean()
        return
    assert cost.num_images == sum(len(batch[0]) for batch in batches)
    mean = cost.mean()
    assert mean.dtype == torch.float64 and mean.shape == (student, teacher)
    np.testing.assert_allclose(mean.numpy(), reference_cost(batches), atol=1e-5)


@examples(ci=30, nightly=500)
@given(data=st.data(), student=FEW, teacher=FEW, wrong=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_features_that_are_not_finite_are_an_error(data, student, teacher, wrong):
    batch = data.draw(features((student, teacher)))
    which = batch[data.draw(st.integers(0, 1))]
    assume(len(which) > 0)
    which[tuple(data.draw(st.integers(0, size - 1)) for size in which.shape)] = wrong
    cost = ChannelCost(student, teacher)
    cost.update(*batch)
    with pytest.raises(ValueError, match="not finite"):
        assign_channels(cost.mean())


@st.composite
def costs(draw, student, teacher):
    """(Cs, Ct): random, of few values (ties), of a large or a tiny range, or of rank one."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["random", "ties", "constant", "rank one", "nearly equal"]))
    values = {
        "random": lambda: rng.uniform(0, 4, (student, teacher)),
        "ties": lambda: rng.integers(0, 3, (student, teacher)).astype(float),
        "constant": lambda: np.full((student, teacher), 2.0),
        "rank one": lambda: np.outer(rng.uniform(0, 2, student), rng.uniform(0, 2, teacher)),
        "nearly equal": lambda: 2 + 1e-9 * rng.normal(size=(student, teacher)),
    }[kind]()
    scale = draw(st.sampled_from([1, 1, 1, -1, 1e-6, 1e6, 1e100]))
    dtypes = {1e6: DTYPES[2:], 1e100: DTYPES[3:]}.get(scale, DTYPES)
    return torch.from_numpy(values * scale).to(draw(st.sampled_from(dtypes)))


def check_groups(groups, student, teacher, size):
    """Each student channel has its number of teacher channels, in order; no teacher channel is there twice."""
    assert groups.dtype == torch.long and groups.shape == (student, size)
    assert (groups == -1).sum() == max(student - teacher, 0)
    taken = groups[groups != -1].tolist()
    assert len(set(taken)) == len(taken) and set(taken) <= set(range(teacher))
    assert all(row == sorted(row) for row in groups.tolist())


def total(cost, groups):
    rows = [(i, j) for i, row in enumerate(groups) for j in row if j >= 0]
    return sum(cost[i][j] for i, j in rows)


def all_groups(student, teacher, size):
    """Every valid assignment, as a list of the rows' teacher channels."""
    if student > teacher:
        for students in itertools.permutations(range(student), teacher):
            yield [[students.index(i)] if i in students else [] for i in range(student)]
        return

    def of_rest(rows, free):
        if not rows:
            yield []
            return
        for group in itertools.combinations(sorted(free), size):
            for rest in of_rest(rows - 1, free - set(group)):
                yield [list(group), *rest]

    yield from of_rest(student, set(range(teacher)))


@examples(ci=60, nightly=1500)
@given(data=st.data(), student=st.integers(1, 4), teacher=st.integers(1, 6))
def test_assignment_is_the_best_of_all(data, student, teacher):
    largest = max(teacher // student, 1)
    size = data.draw(st.none() | st.integers(1, largest))
    cost = data.draw(costs(student, teacher))
    groups = assign_channels(cost, size)
    check_groups(groups, student, teacher, size or largest)
    matrix = cost.double().tolist()
    best = min(total(matrix, candidate) for candidate in all_groups(student, teacher, size or largest))
    spread = max(map(max, matrix)) - min(map(min, matrix))
    assert total(matrix, groups.tolist()) <= best + 1e-9 * spread + 1e-12 * abs(best)


@examples(ci=12, nightly=200)
@given(data=st.data(), student=st.integers(1, 12), teacher=st.integers(1, 40))
def test_assignment_is_that_of_a_linear_program(data, student, teacher):
    largest = max(teacher // student, 1)
    size = data.draw(st.sampled_from(sorted({1, largest})))
    cost = data.draw(costs(student, teacher))
    groups = assign_channels(cost, size)
    check_groups(groups, student, teacher, size)
    # The matrix of the constraints is totally unimodular: its optimum is one of whole numbers.
    matrix = cost.double().numpy()
    scaled = (matrix - matrix.min()) / (np.ptp(matrix) or 1)
    by_student = np.kron(np.eye(student), np.ones(teacher))
    by_teacher = np.kron(np.ones(student), np.eye(teacher))
    if student > teacher:
        limits = {"A_eq": by_teacher, "b_eq": np.ones(teacher), "A_ub": by_student, "b_ub": np.ones(student)}
    else:
        limits = {"A_eq": by_student, "b_eq": np.full(student, size), "A_ub": by_teacher, "b_ub": np.ones(teacher)}
    program = linprog(scaled.ravel(), bounds=(0, 1), **limits)
    assert program.success
    assert total(scaled.tolist(), groups.tolist()) <= program.fun + 1e-6


@examples(ci=30, nightly=400)
@given(data=st.data(), student=st.integers(1, 40), teacher=st.integers(1, 160))
def test_no_random_assignment_is_better(data, student, teacher):
    cost = data.draw(costs(student, teacher))
    size = max(teacher // student, 1)
    groups = assign_channels(cost)
    check_groups(groups, student, teacher, size)
    pairs = min(student * size, teacher)
    ours = matched_cost(cost.double(), groups) * pairs
    matrix, rng = cost.double().numpy(), np.random.default_rng(0)
    for _ in range(20):
        columns = rng.permutation(teacher)[:pairs]
        rows = rng.permutation(np.repeat(np.arange(student), size))[:pairs]
        if student > teacher:
            rows = rng.permutation(student)[:pairs]
        assert ours <= matrix[rows, columns].sum() + 1e-9 * np.abs(matrix).max() * pairs


@examples(ci=30, nightly=300)
@given(student=st.integers(0, 5), teacher=st.integers(0, 8), size=st.integers(-2, 9), wrong=st.booleans())
def test_what_cannot_be_assigned_is_an_error(student, teacher, size, wrong):
    cost = torch.zeros(student, teacher)
    if wrong and cost.numel():
        cost[-1, 0] = float("nan")
        message = "not finite"
    elif 0 in cost.shape:
        message = "at least one channel"
    elif not 1 <= size <= max(teacher // student, 1):
        message = f"group_size is {size}"
    else:
        check_groups(assign_channels(cost, size), student, teacher, size)
        return
    with pytest.raises(ValueError, match=message):
        assign_channels(cost, size)
