"""An update of the matching, against a cost in numpy and its optimum."""

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from mgd_det.distillation import (
    Distiller,
    MatchingStatistics,
    Padding,
    Position,
    matching_statistics,
    negative_margin,
)
from mgd_det.distillation.matching_statistics import norm_margin
from mgd_det.errors import ArgumentError, UserError
from mgd_det.matching import assign_channels

POSITIONS = [Position("res2", "res2", 3, 7), Position("res5.expansion", "res5", 5, 4)]
NO_NORMS = {p.name: None for p in POSITIONS}
SIZES = {"res2": (6, 8), "res5": (3, 4)}


def batch(seed, images):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = {}, {}
    for p in POSITIONS:
        size = SIZES[p.teacher]
        student[p.student] = torch.randn(images, p.student_channels, *size, generator=generator)
        teacher[p.teacher] = torch.randn(images, p.teacher_channels, *size, generator=generator)
    return student, teacher


def cost_in_numpy(batches, p):
    distances = []
    for student, teacher in batches:
        for s, t in zip(student[p.student].double().numpy(), teacher[p.teacher].double().numpy()):
            s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
            s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
            distances.append(((s[:, None] - t[None]) ** 2).sum(-1))
    return np.mean(distances, axis=0)


def negatives_in_numpy(batches, p):
    means = []
    for channel in range(p.teacher_channels):
        values = np.concatenate([teacher[p.teacher].double().numpy()[:, channel].ravel() for _, teacher in batches])
        means.append(values[values < 0].mean())
    return np.array(means)


def squares_in_numpy(maps, margin, groups):
    """Sum of the squares and number of values of the target of teacher maps (C, h, w)."""
    margin, groups = np.asarray(margin, np.float64), groups[groups[:, 0] >= 0]
    total, number = 0.0, 0
    for image in maps:
        members = image.double().numpy()[groups]  # (Cs, K, h, w)
        largest = np.abs(members).argmax(axis=1)
        target = np.take_along_axis(members, largest[:, None], axis=1)[:, 0]
        total += (np.maximum(target, margin[groups].mean(1).reshape(-1, 1, 1)) ** 2).sum()
        number += target.size
    return np.array([total, number])


def first_scale_in_numpy(batches, p):
    """Of a first matching whose margins are measured: the groups of the first batch alone, the margins so far."""
    groups = assign_channels(torch.from_numpy(cost_in_numpy(batches[:1], p))).numpy()
    return sum(
        squares_in_numpy(teacher[p.teacher], negatives_in_numpy(batches[: i + 1], p), groups)
        for i, (_, teacher) in enumerate(batches)
    )


def update(distiller, batches, margin="auto", norms=None):
    measurement = MatchingStatistics(distiller, norms or {p.name: None for p in POSITIONS}, margin)
    for student, teacher in batches:
        measurement.update(student, teacher)
    return measurement, measurement.solve()


def pairs_of(groups):
    return {(i, int(j)) for i, group in enumerate(groups) for j in group if j >= 0}


def mean_cost(cost, groups):
    return np.mean([cost[i, j] for i, j in pairs_of(groups)])


def owners(groups, number):
    owner = dict((j, i) for i, j in pairs_of(groups))
    return [owner.get(j) for j in range(number)]


# ------------------------------------------------------------------ alternating measurement


@pytest.mark.parametrize("reducer", ["amp", "sm"])
def test_groups_are_optimal_for_all_images_measured(reducer):
    batches = [batch(1, 3), batch(2, 1), batch(3, 2)]
    distiller = Distiller(POSITIONS, reducer=reducer)
    measurement, reports = update(distiller, batches)
    assert measurement.num_images == 6 and distiller.is_matched
    assert [report.position for report in reports] == POSITIONS
    for p, report in zip(POSITIONS, reports):
        cost = cost_in_numpy(batches, p)
        expected = assign_channels(torch.from_numpy(cost), 1 if reducer == "sm" else None)
        groups = distiller.groups(p)
        assert torch.equal(groups, expected)
        assert report.group_size == groups.shape[1] == (2 if reducer == "amp" and p.name == "res2" else 1)
        assert report.cost_after == pytest.approx(mean_cost(cost, groups.numpy()), rel=1e-6)
        assert report.cost_before is None and report.moved is None


@pytest.mark.parametrize("reducer", ["amp", "sm"])
def test_reports_compare_with_the_former_groups_on_the_new_costs(reducer):
    first, second = [batch(1, 3)], [batch(7, 2), batch(8, 1)]
    distiller = Distiller(POSITIONS, reducer=reducer)
    update(distiller, first)
    former = {p.name: distiller.groups(p).clone().numpy() for p in POSITIONS}
    _, reports = update(distiller, second)
    moved = []
    for p, report in zip(POSITIONS, reports):
        cost = cost_in_numpy(second, p)
        groups = distiller.groups(p).numpy()
        assert torch.equal(distiller.groups(p), assign_channels(torch.from_numpy(cost), 1 if reducer == "sm" else None))
        assert report.cost_before == pytest.approx(mean_cost(cost, former[p.name]), rel=1e-6)
        assert report.cost_after == pytest.approx(mean_cost(cost, groups), rel=1e-6)
        assert report.cost_after < report.cost_before
        changes = zip(owners(former[p.name], p.teacher_channels), owners(groups, p.teacher_channels))
        assert report.moved == sum(one != other for one, other in changes)
        moved.append(report.moved)
    assert min(moved) > 0


def test_the_same_images_move_nothing():
    batches = [batch(1, 3)]
    distiller = Distiller(POSITIONS)
    update(distiller, batches)
    _, reports = update(distiller, batches)
    for report in reports:
        assert report.moved == 0 and report.cost_before == report.cost_after


def test_nothing_is_in_force_before_solve():
    distiller = Distiller(POSITIONS)
    measurement = MatchingStatistics(distiller, {p.name: None for p in POSITIONS})
    measurement.update(*batch(1, 2))
    assert not distiller.is_matched
    measurement.solve()
    assert distiller.is_matched


# ------------------------------------------------------------------ margin and mean square


def test_measured_margin_and_mean_square_of_the_target():
    batches = [batch(1, 3), batch(2, 2)]
    distiller = Distiller(POSITIONS, reducer="amp")
    _, reports = update(distiller, batches, "measured")
    assert [report.mean_square for report in reports] == [distiller.mean_square(p).item() for p in POSITIONS]
    for p in POSITIONS:
        margin = negatives_in_numpy(batches, p)
        np.testing.assert_allclose(distiller.margin(p).numpy(), margin, rtol=1e-5)
        total, number = first_scale_in_numpy(batches, p)
        assert distiller.mean_square(p).item() == pytest.approx(total / number, rel=1e-5)


@pytest.mark.parametrize("batches", [1, 2])
def test_padding_counts_neither_for_the_scale_nor_for_measured_margins(batches):
    # Of the second image at strides 8 and 16; a row or column that it covers in part counts.
    padding = Padding([(48, 64), (33, 17)], (48, 64))
    covered = {"res2": (5, 3), "res5": (3, 2)}
    clean = [batch(seed, 2) for seed in range(batches)]
    whole, cropped = Distiller(POSITIONS), []
    for _, teacher in clean:
        parts = {}
        for name, maps in teacher.items():
            height, width = covered[name]
            parts[name] = [maps[0].clone(), maps[1, :, :height, :width].clone()]
            maps[1, :, height:], maps[1, :, :, width:] = -50.0, -50.0
        cropped.append(parts)
    measurement = MatchingStatistics(whole, NO_NORMS, "measured")
    for student, teacher in clean:
        measurement.update(student, teacher, padding)
    measurement.solve()
    for p in POSITIONS:
        margins = []
        for until in range(1, batches + 1):
            values = [
                torch.cat([x[c].flatten() for parts in cropped[:until] for x in parts[p.teacher]])
                for c in range(p.teacher_channels)
            ]
            margins.append([x[x < 0].double().mean().item() for x in values])
        np.testing.assert_allclose(whole.margin(p).numpy(), margins[-1], rtol=1e-5)
        groups = assign_channels(torch.from_numpy(cost_in_numpy(clean[:1], p))).numpy()
        total, number = sum(squares_in_numpy(parts[p.teacher], m, groups) for parts, m in zip(cropped, margins))
        assert whole.mean_square(p).item() == pytest.approx(total / number, rel=1e-5)


@pytest.mark.parametrize("reducer", ["amp", "sm"])
def test_the_first_window_measures_the_scale_by_the_groups_in_force_and_later_ones_keep_it(reducer):
    distiller = Distiller(POSITIONS, reducer=reducer)
    update(distiller, [batch(9, 2)])
    before = {p.name: (distiller.groups(p).clone().numpy(), distiller.margin(p).clone().numpy()) for p in POSITIONS}
    batches = [batch(1, 3), batch(2, 1)]
    # Resumed in between; the features of a step that is not finite are left out.
    first, second = (MatchingStatistics(distiller, NO_NORMS, of_training=True, first_window=True) for _ in range(2))
    first.update(*batches[0])
    bad = batch(3, 2)
    bad[1]["res2"][0, 0, 0, 0], bad[1]["res5"][1, 1, 1, 1] = float("inf"), float("nan")
    first.update(*bad)
    second.load_sums(first.sums)
    second.update(*batches[1])
    reports = second.solve()
    for p, report in zip(POSITIONS, reports):
        groups, margin = before[p.name]
        total, number = sum(squares_in_numpy(teacher[p.teacher], margin, groups) for _, teacher in batches)
        assert report.mean_square == pytest.approx(total / number, rel=1e-5)
        assert report.moved > 0 and not np.array_equal(distiller.groups(p).numpy(), groups)
    third = MatchingStatistics(distiller, NO_NORMS, of_training=True)
    third.update(*[{name: 3 * x for name, x in maps.items()} for maps in batches[0]])
    assert [report.mean_square for report in third.solve()] == [report.mean_square for report in reports]


def test_an_open_window_of_a_version_without_the_scale_goes_on():
    distiller = Distiller(POSITIONS)
    update(distiller, [batch(9, 2)])
    windows = [MatchingStatistics(distiller, NO_NORMS, of_training=True, first_window=True) for _ in range(2)]
    windows[0].update(*batch(1, 3))
    without = windows[0].sums[: -2 * len(POSITIONS)]
    windows[1].load_sums(without)
    assert windows[1].num_images == 3 and torch.equal(windows[1].sums[: len(without)], without)
    scales = [distiller.mean_square(p).item() for p in POSITIONS]
    assert [report.mean_square for report in windows[1].solve()] == scales


def test_scale_target_is_in_units_of_the_target():
    """A student of 0 is off by the whole target, and so costs 1, whatever the teacher's unit is."""
    batches = [batch(1, 4)]
    distiller = Distiller(POSITIONS, norm="", losses={"partial_l2": {"weights": 1.0}})
    update(distiller, batches, "measured")
    student, teacher = batches[0]
    losses = distiller({name: torch.zeros_like(x) for name, x in student.items()}, teacher)
    for loss in losses.values():
        assert loss.item() == pytest.approx(1.0, rel=1e-5)
    louder = {name: 10 * x for name, x in teacher.items()}
    distiller = Distiller(POSITIONS, norm="", losses={"partial_l2": {"weights": 1.0}})
    update(distiller, [(student, louder)], "measured")
    for loss in distiller({name: torch.zeros_like(x) for name, x in student.items()}, louder).values():
        assert loss.item() == pytest.approx(1.0, rel=1e-5)


def teacher_norm(kind, channels, folded=False):
    torch.manual_seed(0)
    norm = kind(channels)
    if not folded:
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


NORM = {
    "BN": lambda: teacher_norm(nn.BatchNorm2d, 7),
    "FrozenBN": lambda: teacher_norm(FrozenBatchNorm2d, 7),
}


def without_bias():
    norm = teacher_norm(nn.BatchNorm2d, 7)
    norm.bias = None
    return norm


NO_NORM = {
    "no bias": without_bias,
    "none": lambda: None,
    "folded FrozenBN": lambda: teacher_norm(FrozenBatchNorm2d, 7, folded=True),
    "folded BN": lambda: teacher_norm(nn.BatchNorm2d, 7, folded=True),
    "no affine": lambda: nn.BatchNorm2d(7, affine=False),
    "another width": lambda: teacher_norm(nn.BatchNorm2d, 6),
}


@pytest.mark.parametrize("name", list(NORM))
@pytest.mark.parametrize("source", ["auto", "norm"])
def test_margin_of_the_norm_layer(name, source):
    norm = NORM[name]()
    margin = norm_margin(norm, POSITIONS[0], source)
    assert torch.equal(margin, negative_margin(norm.weight, norm.bias)) and not margin.requires_grad
    assert norm_margin(norm, POSITIONS[0], "measured") is None


@pytest.mark.parametrize("norm", [nn.GroupNorm(7, 7), nn.LayerNorm(7)], ids=["GN", "LN"])
def test_a_norm_layer_of_several_channels_gives_a_margin_only_on_demand(norm):
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert norm_margin(norm, POSITIONS[0], "auto") is None
    assert torch.equal(norm_margin(norm, POSITIONS[0], "norm"), negative_margin(norm.weight, norm.bias))


@pytest.mark.parametrize("name", list(NO_NORM))
def test_no_norm_layer_that_describes_the_feature(name):
    assert norm_margin(NO_NORM[name](), POSITIONS[0], "auto") is None
    with pytest.raises(ArgumentError, match="margin is 'norm'.*'res2'"):
        norm_margin(NO_NORM[name](), POSITIONS[0], "norm")


def test_an_unknown_source_of_the_margin():
    with pytest.raises(ArgumentError, match="margin is 'mean'"):
        norm_margin(None, POSITIONS[0], "mean")


@pytest.mark.parametrize("source", ["auto", "measured"])
def test_each_position_gets_the_margin_of_its_own_source(source):
    norm = NORM["FrozenBN"]()
    batches = [batch(1, 3), batch(2, 2)]
    distiller = Distiller(POSITIONS)
    update(distiller, batches, source, {"res2": norm, "res5_expansion": None})
    res2, res5 = (distiller.margin(p).numpy() for p in POSITIONS)
    np.testing.assert_allclose(res5, negatives_in_numpy(batches, POSITIONS[1]), rtol=1e-5)
    if source == "auto":
        np.testing.assert_allclose(res2, negative_margin(norm.weight, norm.bias).numpy(), rtol=1e-6)
    else:
        np.testing.assert_allclose(res2, negatives_in_numpy(batches, POSITIONS[0]), rtol=1e-5)


def test_norm_margins_where_a_position_has_no_norm_layer():
    with pytest.raises(ArgumentError, match="'norm'.*'res5'.*no norm layer"):
        MatchingStatistics(Distiller(POSITIONS), {"res2": NORM["BN"](), "res5_expansion": None}, "norm")


# ------------------------------------------------------------------ of training's own features


def test_a_measurement_goes_on_from_its_sums():
    batches = [batch(1, 3), batch(2, 1)]
    whole, halves = Distiller(POSITIONS), Distiller(POSITIONS)
    update(whole, batches, "measured")
    for distiller in (whole, halves):
        update(distiller, [batch(9, 2)], "measured")  # of training's features only later matchings are
    parts = [MatchingStatistics(halves, NO_NORMS, "measured", of_training=True) for _ in batches]
    parts[0].update(*batches[0])
    parts[1].load_sums(parts[0].sums)
    parts[1].update(*batches[1])
    assert parts[1].num_images == 4 and not parts[1].last_teacher
    parts[1].solve()
    for p in POSITIONS:
        assert torch.equal(halves.groups(p), assign_channels(torch.from_numpy(cost_in_numpy(batches, p))))
        np.testing.assert_allclose(halves.margin(p).numpy(), negatives_in_numpy(batches, p), rtol=1e-5)
    other = MatchingStatistics(Distiller(POSITIONS[:1]), NO_NORMS, "measured", of_training=True)
    with pytest.raises(UserError, match="other positions, nets or margins"):
        other.load_sums(parts[0].sums)


def test_batches_that_are_not_finite_are_left_out_of_training_s_own_features():
    good, bad = batch(1, 3), batch(2, 2)
    bad[1]["res2"][0, 0, 0, 0] = float("inf")
    distiller = Distiller(POSITIONS)
    update(distiller, [good], "measured")
    measurement = MatchingStatistics(distiller, NO_NORMS, "measured", of_training=True)
    for features in (good, bad):
        measurement.update(*features)
    np.testing.assert_allclose(measurement.cost(POSITIONS[0]).numpy(), cost_in_numpy([good], POSITIONS[0]), atol=1e-6)
    measurement.solve()
    assert all(distiller.margin(p).isfinite().all() for p in POSITIONS)

    nothing = MatchingStatistics(distiller, NO_NORMS, of_training=True)
    nothing.update(*bad)
    with pytest.raises(FloatingPointError, match="matching at res2: no image"):
        nothing.solve()
    whole = MatchingStatistics(distiller, NO_NORMS)
    whole.update(*bad)
    with pytest.raises(FloatingPointError, match="matching at res2: .*not finite"):
        whole.solve()


# ------------------------------------------------------------------ several ranks


def test_two_ranks_solve_what_one_would_over_the_union(run_ranks):
    batches = [batch(n, images) for n, images in enumerate((4, 1, 2, 3))]
    shares = [batches[:1], batches[1:]]  # 4 images and 6

    def rank_update(rank):
        distiller = Distiller(POSITIONS)
        measurement, reports = update(distiller, shares[rank], "measured")
        state = distiller.distillation_state()["matchings"]
        return state, measurement.num_images, [report.cost_after for report in reports]

    alone = Distiller(POSITIONS)
    _, reports = update(alone, batches, "measured")
    ranks = run_ranks(rank_update, 2)
    for state, images, costs in ranks:
        assert images == 10
        assert costs == pytest.approx([report.cost_after for report in reports], rel=1e-12)
        for p in POSITIONS:
            assert torch.equal(state[p.name]["groups"], alone.groups(p))
            torch.testing.assert_close(state[p.name]["margin"], alone.margin(p), rtol=1e-6, atol=0)
            assert torch.equal(state[p.name]["mean_square"], ranks[0][0][p.name]["mean_square"])
            # A rank of one batch measures it by the groups and margins of all.
            (_, teacher), margin = shares[0][0], alone.margin(p)
            total, number = squares_in_numpy(teacher[p.teacher], margin, alone.groups(p).numpy())
            total, number = first_scale_in_numpy(shares[1], p) + (total, number)
            assert state[p.name]["mean_square"].item() == pytest.approx(total / number, rel=1e-5)

    only_first = Distiller(POSITIONS)
    update(only_first, shares[0], "measured")
    assert not torch.equal(only_first.groups(POSITIONS[0]), alone.groups(POSITIONS[0]))


def test_ranks_agree_where_costs_tie(run_ranks):
    """Rank 1 solves with another answer in mind; rank 0's counts."""

    def rank_update(rank):
        distiller = Distiller(POSITIONS)
        if rank == 1:  # a process of its own: nothing to put back
            matching_statistics.assign_channels = lambda cost, size: assign_channels(cost, size).flip(0)
        update(distiller, [batch(5, 2)])
        return [distiller.groups(p) for p in POSITIONS]

    one, other = run_ranks(rank_update, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, other))
