"""The kinds of matching at a position: identity, adapter, random and assignment."""

import numpy as np
import oracles
import pytest
import torch

from mgd_det.distillation import Distiller, MatchingStatistics, Position
from mgd_det.distillation.positions import make_positions
from mgd_det.errors import ArgumentError, UserError


def maps(**channels):
    return {name: torch.zeros(1, count, 4, 4) for name, count in channels.items()}


def kinds(pairs, student, teacher, matchings):
    return [p.matching for p in make_positions(pairs, maps(**student), maps(**teacher), matchings)]


def test_auto_is_identity_at_equally_wide_levels_of_the_fpn():
    pairs = [["res4", "res4"], ["p3", "p3"], ["p4", "p4"], ["p5", "res5"]]
    student, teacher = {"res4": 8, "p3": 8, "p4": 8, "p5": 8}, {"res4": 8, "p3": 8, "p4": 16, "res5": 8}
    assert kinds(pairs, student, teacher, "auto") == ["assignment", "identity", "assignment", "assignment"]
    assert kinds(pairs, student, teacher, ["random"]) == ["random"] * 4
    one_each = ["identity", "assignment", "adapter", "auto"]
    assert kinds(pairs, student, teacher, one_each) == ["identity", "assignment", "adapter", "assignment"]


def test_auto_is_inherited_at_narrower_levels_of_an_inherited_fpn():
    pairs = [["res4", "res4"], ["p3", "p3"], ["p4", "p4"], ["p5", "p5"]]
    student, teacher = {"res4": 4, "p3": 4, "p4": 8, "p5": 9}, {"res4": 8, "p3": 8, "p4": 8, "p5": 8}
    positions = make_positions(pairs, maps(**student), maps(**teacher), "auto", inherits_fpn=True)
    assert [p.matching for p in positions] == ["assignment", "inherited", "identity", "assignment"]
    for pair, named in ((pairs[0], "'res4'.* 4 .* 8"), (pairs[3], "'p5'.* 9 .* 8")):
        with pytest.raises(ArgumentError, match=f"matchings is 'inherited' at {named}"):
            kinds([pair], student, teacher, "inherited")
    assert kinds(pairs[1:3], student, teacher, "inherited") == ["inherited", "identity"]


@pytest.mark.parametrize(
    "matchings, named",
    [("nearest", "'nearest'"), (["auto", "auto", "auto"], "2, one a position"), ("identity", "'p4'.*8.*16")],
)
def test_an_unsuitable_matching_is_named(matchings, named):
    with pytest.raises(ArgumentError, match=f"matchings.*{named}"):
        kinds([["p3", "p3"], ["p4", "p4"]], {"p3": 8, "p4": 8}, {"p3": 8, "p4": 16}, matchings)


def features(position, images=2):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(images, position.student_channels, 3, 4, generator=generator)
    teacher = torch.randn(images, position.teacher_channels, 3, 4, generator=generator)
    return {position.student: student}, {position.teacher: teacher}


def pkd(student, target):
    """1 - Pearson correlation of each channel over all images and pixels, the mean over channels, by numpy."""
    pairs = zip(student.swapaxes(0, 1), target.swapaxes(0, 1))
    return 1 - np.mean([np.corrcoef(s.ravel(), t.ravel())[0, 1] for s, t in pairs])


def test_identity_pairs_channel_i_with_channel_i_and_measures_nothing():
    position = Position("p3", "p3", 6, 6, "identity")
    distiller = Distiller([position], losses={"pkd": {"weights": 1.0}})
    assert distiller.is_matched and not distiller.matched_positions and not list(distiller.parameters())
    student, teacher = features(position)
    loss = distiller(student, teacher)["loss_pkd_p3"].item()
    assert loss == pytest.approx(pkd(student["p3"].numpy(), teacher["p3"].numpy()), rel=1e-5)


def test_an_adapter_is_learned_and_sees_all_channels_of_both():
    position = Position("p3", "p3", 4, 6, "adapter")
    state = torch.random.get_rng_state()
    distiller = Distiller([position], losses={"pkd": {"weights": 1.0}})
    assert torch.equal(torch.random.get_rng_state(), state)
    student, teacher = features(position)
    loss = distiller(student, teacher)["loss_pkd_p3"]
    weight = distiller.adapters["p3"].weight.detach().numpy()[:, :, 0, 0]
    adapted = np.einsum("ts,bshw->bthw", weight, student["p3"].numpy())
    assert loss.item() == pytest.approx(pkd(adapted, teacher["p3"].numpy()), rel=1e-4)
    loss.backward()
    assert distiller.adapters["p3"].weight.grad.abs().min() > 0
    # Attention maps are of the student's own channels: an adapter would get no gradient.
    assert not Distiller([position], losses={"at": {"weights": 1.0}}).adapters


@pytest.mark.parametrize("channels, size", [((4, 9), 2), ((4, 4), 1), ((6, 4), 1)])
def test_random_groups_are_groups_and_stay(channels, size):
    position = Position("p3", "p3", *channels, "random")
    groups = Distiller([position], losses={"pkd": {"weights": 1.0}}).groups(position)
    matched = groups[groups[:, 0] >= 0]
    assert matched.shape == (min(channels), size) and len(matched.unique()) == matched.numel()
    again = Distiller([position], losses={"pkd": {"weights": 1.0}}).groups(position)
    other = Distiller([Position("p4", "p4", *channels, "random")], losses={"pkd": {"weights": 1.0}})
    assert torch.equal(groups, again) and not torch.equal(groups, other.groups(other.positions[0]))


def test_random_groups_pair_as_they_say_where_the_teacher_is_narrower():
    position = Position("p3", "p3", 6, 4, "random")
    distiller = Distiller([position], losses={"pkd": {"weights": 1.0}})
    student, teacher = features(position)
    pairs = [(i, g) for i, (g,) in enumerate(distiller.groups(position).tolist()) if g >= 0]
    rows, columns = zip(*pairs)
    expected = pkd(student["p3"].numpy()[:, rows], teacher["p3"].numpy()[:, columns])
    assert distiller(student, teacher)["loss_pkd_p3"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind, channels", [("identity", (6, 6)), ("adapter", (4, 6)), ("random", (3, 6))])
def test_margin_and_scale_are_measured_though_the_groups_are_fixed(kind, channels):
    position = Position("p3", "p3", *channels, kind)
    distiller = Distiller([position], losses={"partial_l2": {"weights": 1.0, "scale": "mean"}}, norm="")
    assert distiller.matched_positions == [position] and not distiller.is_matched
    groups = distiller.groups(position).clone()
    student, teacher = features(position)
    statistics = MatchingStatistics(distiller, {"p3": None})
    statistics.update(student, teacher)
    (report,) = statistics.solve()
    assert torch.equal(distiller.groups(position), groups) and report.group_size == groups.shape[1]
    maps = teacher["p3"].double().numpy()
    margin = np.array([x[x < 0].mean() for x in maps.swapaxes(0, 1)])
    target, margin = oracles.absolute_max_pooling(maps, margin, groups.numpy())
    adapted = distiller.adapted(position, student["p3"]).double().numpy()
    expected = oracles.partial_l2(adapted, target, margin)[0].mean()
    assert distiller(student, teacher)["loss_mgd_p3"].item() == pytest.approx(expected, rel=1e-5)


def test_inherited_channels_learn_from_those_that_they_come_from():
    position = Position("p3", "p3", 3, 7, "inherited")
    losses = {"pkd": {"weights": 1.0}, "partial_l2": {"weights": 1.0, "scale": "mean"}}
    distillers = [Distiller([position], losses=losses, norm="") for _ in range(2)]
    student, teacher = features(position)
    for use in (distillers[0], lambda *maps: solved(distillers[0], *maps)):
        with pytest.raises(UserError, match="p3 is 'inherited'.*inherit_from_config"):
            use(student, teacher)
    for wrong in ([0, 1], [1, 1, 2], [0, 1, 7], [-1, 0, 1]):
        with pytest.raises(ValueError, match="p3: give 3 different ones of 7"):
            distillers[0].set_inherited_channels(torch.tensor(wrong))
    distillers[0].set_inherited_channels(torch.tensor([1, 4, 5]))
    (report,) = solved(distillers[0], student, teacher)
    assert distillers[0].groups(position).tolist() == [[1], [4], [5]] and report.group_size == 1
    found = distillers[0](student, teacher)
    target = teacher["p3"][:, [1, 4, 5]].double().numpy()
    assert found["loss_pkd_p3"].item() == pytest.approx(pkd(student["p3"].numpy(), target), rel=1e-5)
    margin = np.array([x[x < 0].mean() for x in target.swapaxes(0, 1)])
    expected = oracles.partial_l2(student["p3"].double().numpy(), target, margin)[0].mean()
    assert found["loss_mgd_p3"].item() == pytest.approx(expected, rel=1e-5)

    distillers[1].load_distillation_state(distillers[0].distillation_state())
    resumed = distillers[1](student, teacher)
    assert all(torch.equal(resumed[name], loss) for name, loss in found.items())
    assigned = Distiller([Position("p3", "p3", 3, 7)], losses=losses, norm="")
    with pytest.raises(UserError, match="MODEL.MGD.MATCHING.KINDS 'inherited'.*'assignment'"):
        assigned.load_distillation_state(distillers[0].distillation_state())


def solved(distiller, student, teacher):
    statistics = MatchingStatistics(distiller, {"p3": None})
    statistics.update(student, teacher)
    return statistics.solve()


def test_weights_decay_one_by_one():
    position = Position("p3", "p3", 6, 6, "identity")
    losses = {"pkd": {"weights": 2.0, "decay": "linear"}, "at": {"weights": 3.0}}
    distiller, (student, teacher) = Distiller([position], losses=losses), features(position)
    first, later = (distiller(student, teacher, progress=t) for t in (0.0, 0.75))
    assert later["loss_pkd_p3"].item() == pytest.approx(first["loss_pkd_p3"].item() / 4)
    assert later["loss_at_p3"].item() == first["loss_at_p3"].item()
    with pytest.raises(ArgumentError, match="losses.pkd.decay.*'slow'"):
        Distiller([position], losses={"pkd": {"decay": "slow"}})


def test_the_state_has_the_adapter_and_says_what_is_measured():
    position = Position("p3", "p3", 4, 6, "adapter")
    losses = {"partial_l2": {"weights": 1.0}}
    trained, resumed = Distiller([position], losses=losses), Distiller([position], losses=losses)
    resumed.load_distillation_state(trained.distillation_state())
    assert torch.equal(resumed.adapters["p3"].weight, trained.adapters["p3"].weight)
    assert not resumed.is_matched  # though its groups are known
    statistics = MatchingStatistics(trained, {"p3": None})
    statistics.update(*features(position))
    statistics.solve()
    resumed.load_distillation_state(trained.distillation_state())
    student, teacher = features(position)
    assert torch.equal(trained(student, teacher)["loss_mgd_p3"], resumed(student, teacher)["loss_mgd_p3"])
    matched = Distiller([Position("p3", "p3", 4, 6)], losses=losses)
    with pytest.raises(UserError, match="MODEL.MGD.MATCHING.KINDS 'adapter'.*'assignment'"):
        matched.load_distillation_state(trained.distillation_state())
