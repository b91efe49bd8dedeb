"""The assignment, against all assignments there are and against a linear program."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from mgd_det.matching import assign_channels, matched_cost


def random_cost(seed, num_student, num_teacher):
    return np.random.default_rng(seed).uniform(0, 4, (num_student, num_teacher))


def solve(cost, group_size=None):
    return assign_channels(torch.from_numpy(np.asarray(cost)), group_size).tolist()


def total(cost, groups):
    return sum(cost[i][j] for i, group in enumerate(groups) for j in group if j >= 0)


def all_assignments(num_student, num_teacher, size):
    """Every M of equation 4, as groups of ascending teacher channels."""
    if num_student > num_teacher:
        for owners in permutations(range(num_student), num_teacher):
            groups = [[-1] for _ in range(num_student)]
            for teacher, student in enumerate(owners):
                groups[student] = [teacher]
            yield groups
        return

    def fill(student, free):
        if student == num_student:
            yield []
            return
        for group in combinations(sorted(free), size):
            for rest in fill(student + 1, free - set(group)):
                yield [list(group)] + rest

    yield from fill(0, set(range(num_teacher)))


def transport_optimum(cost, size):
    """The least total cost by a linear program, whose optimum is a vertex and so binary."""
    num_student, num_teacher = cost.shape
    rows = np.kron(np.eye(num_student), np.ones(num_teacher))
    columns = np.kron(np.ones(num_student), np.eye(num_teacher))
    if num_student > num_teacher:
        equal, to, at_most, most = columns, 1, rows, 1
    else:
        equal, to, at_most, most = rows, size, columns, 1
    result = linprog(
        cost.ravel(),
        A_ub=at_most,
        b_ub=np.full(len(at_most), most),
        A_eq=equal,
        b_eq=np.full(len(equal), to),
        bounds=(0, 1),
    )
    assert result.success
    return result.fun


SMALL = [
    # Cs, Ct, group size asked for, size had
    (2, 6, None, 3),
    (3, 6, None, 2),
    (3, 8, None, 2),
    (2, 7, None, 3),
    (4, 4, None, 1),
    (3, 5, None, 1),
    (1, 4, None, 4),
    (6, 3, None, 1),
    (4, 1, None, 1),
    (2, 6, 1, 1),
    (2, 7, 2, 2),
]


@pytest.mark.parametrize("num_student, num_teacher, asked, size", SMALL)
def test_is_the_best_of_all_assignments(num_student, num_teacher, asked, size):
    for seed in range(4):
        cost = random_cost(seed, num_student, num_teacher)
        best = min(all_assignments(num_student, num_teacher, size), key=lambda groups: total(cost, groups))
        assert solve(cost, asked) == best


@pytest.mark.parametrize("num_student, num_teacher, asked, size", SMALL)
def test_reaches_the_least_total_where_costs_tie(num_student, num_teacher, asked, size):
    for seed in range(4):
        cost = np.random.default_rng(seed).integers(0, 3, (num_student, num_teacher)).astype(float)
        least = min(total(cost, groups) for groups in all_assignments(num_student, num_teacher, size))
        assert total(cost, solve(cost, asked)) == least


@pytest.mark.parametrize(
    "num_student, num_teacher, asked, size",
    [(6, 20, None, 3), (6, 20, 2, 2), (16, 16, None, 1), (8, 32, None, 4), (20, 6, None, 1), (12, 47, None, 3)],
)
def test_reaches_the_optimum_of_the_transport_problem(num_student, num_teacher, asked, size):
    cost = random_cost(num_student + num_teacher, num_student, num_teacher)
    assert total(cost, solve(cost, asked)) == pytest.approx(transport_optimum(cost, size), abs=1e-9)


def likeness_cost(seed, num_student, num_teacher):
    """Costs as features have them: a few patterns that many channels share, of either sign."""
    generator = np.random.default_rng(seed)
    patterns = generator.normal(size=(6, 40))
    maps = [
        generator.normal(size=(n, 6)) @ patterns + generator.normal(size=(n, 40)) for n in (num_student, num_teacher)
    ]
    student, teacher = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in maps)
    return 2 - 2 * student @ teacher.T


@pytest.mark.parametrize(
    "num_student, num_teacher, size",
    # Square; a remainder of few, of many; student channels left over, few and many.
    [(128, 128, 1), (48, 192, 4), (50, 219, 4), (50, 219, 2), (70, 64, 1), (100, 30, 1)],
)
def test_reaches_the_optimum_of_costs_of_features(num_student, num_teacher, size):
    """Against the rectangular problem of equal rows, which scipy solves from nothing."""
    for seed in range(3):
        cost = likeness_cost(seed, num_student, num_teacher)
        cost[0, 0] = 1e4 if seed == 2 else cost[0, 0]  # of another magnitude than all others
        rows, columns = linear_sum_assignment(np.repeat(cost, size, axis=0))
        groups = solve(cost, size)
        used = [j for group in groups for j in group if j >= 0]
        assert len(used) == len(set(used)) == min(num_student * size, num_teacher)
        assert total(cost, groups) == pytest.approx(np.repeat(cost, size, axis=0)[rows, columns].sum(), abs=1e-9)


def test_structure_at_random_sizes():
    generator = np.random.default_rng(0)
    for seed in range(60):
        num_student, num_teacher = generator.integers(1, 25, 2)
        groups = assign_channels(torch.from_numpy(random_cost(seed, num_student, num_teacher)))
        assert groups.dtype == torch.long and groups.device.type == "cpu"
        assert groups.shape == (num_student, max(num_teacher // num_student, 1))
        used = groups[groups >= 0].tolist()
        assert len(used) == len(set(used)) and max(used) < num_teacher
        assert int((groups == -1).sum()) == max(num_student - num_teacher, 0)
        assert groups.min() >= -1
        assert torch.equal(groups, groups.sort(dim=1).values)


@pytest.mark.parametrize("drop", [[0], [2, 0], [6]])
def test_the_costliest_channels_are_dropped_wherever_they_are(drop):
    cost = random_cost(5, 2, 6 + len(drop) % 2)
    cost[:, drop] += 100
    groups = solve(cost, (cost.shape[1] - len(drop)) // 2)
    assert set(range(cost.shape[1])) - {j for group in groups for j in group} >= set(drop)


def test_a_remainder_at_the_front_is_dropped():
    """Ct is no multiple of Cs: it is not the last channel by index that goes."""
    cost = np.ones((2, 5))
    cost[:, 0] = 3
    assert sorted(sum(solve(cost), [])) == [1, 2, 3, 4]


def test_student_channels_of_the_worst_fit_are_left_out():
    cost = np.array([[3.0, 3.0], [0.0, 1.0], [3.0, 3.0], [1.0, 0.0]])
    assert solve(cost) == [[-1], [0], [-1], [1]]


def test_a_cost_that_greed_gets_wrong():
    # The cheapest pair (0, 0) would force (1, 1) at 9.
    assert solve([[0.0, 1.0], [1.0, 9.0]]) == [[1], [0]]


@pytest.mark.parametrize("shape", [(3, 6), (3, 7), (6, 3), (4, 4)])
def test_all_costs_equal_still_gives_a_whole_matching(shape):
    groups = solve(np.full(shape, 2.0))
    used = [j for group in groups for j in group if j >= 0]
    assert len(set(used)) == len(used) == min(shape[1], shape[0] * max(shape[1] // shape[0], 1))


def test_is_deterministic():
    tied = np.random.default_rng(1).integers(0, 3, (16, 64)).astype(float)
    first = solve(tied)
    for _ in range(3):
        assert solve(tied.copy()) == first


def test_unit_of_the_cost_does_not_matter():
    cost = random_cost(3, 5, 16)
    assert solve(cost * 1e-6 - 7) == solve(cost) == solve(1e6 * cost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_any_dtype(dtype):
    cost = torch.tensor([[4, 1, 3, 0], [0, 4, 1, 4]], dtype=dtype)
    assert assign_channels(cost).tolist() == [[1, 3], [0, 2]]


def test_leaves_the_cost_alone_and_takes_one_with_gradient():
    cost = torch.from_numpy(random_cost(0, 3, 6)).requires_grad_()
    before = cost.detach().clone()
    assert not assign_channels(cost).requires_grad
    assert torch.equal(cost, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_cost_that_is_not_finite_is_named(value):
    cost = torch.ones(3, 6)
    cost[1, 4] = value
    with pytest.raises(ValueError, match="student channel 1 and teacher channel 4"):
        assign_channels(cost)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (4,), (2, 2, 2)])
def test_no_matrix(shape):
    with pytest.raises(ValueError, match="matrix"):
        assign_channels(torch.ones(shape))


@pytest.mark.parametrize("shape, group_size", [((2, 7), 4), ((2, 7), 0), ((2, 7), -1), ((4, 4), 2), ((6, 3), 2)])
def test_a_group_size_that_cannot_be_had(shape, group_size):
    with pytest.raises(ValueError, match=f"group_size is {group_size}"):
        assign_channels(torch.ones(shape), group_size)


def test_matched_cost_is_the_mean_over_pairs():
    cost = torch.tensor([[0.5, 1.0, 2.0, 3.5], [4.0, 0.0, 1.5, 2.5]], dtype=torch.float64)
    assert matched_cost(cost, torch.tensor([[0, 3], [1, 2]])) == pytest.approx((0.5 + 3.5 + 0.0 + 1.5) / 4)


def test_matched_cost_leaves_unmatched_channels_out():
    cost = torch.tensor([[1.0, 7.0], [9.0, 9.0], [7.0, 2.0]])
    assert matched_cost(cost, torch.tensor([[0], [-1], [1]])) == pytest.approx(1.5)


@pytest.mark.slow
def test_the_widest_stage_of_a_resnet():
    """512 x 2048: no worse than a greedy choice, with every channel used once."""
    cost = random_cost(0, 512, 2048)
    groups = solve(cost)
    assert sorted(j for group in groups for j in group) == list(range(2048))
    left, greedy = cost.copy(), 0.0
    for _ in range(4):
        for i in range(512):
            j = left[i].argmin()
            greedy += left[i, j]
            left[:, j] = np.inf
    assert total(cost, groups) <= greedy
