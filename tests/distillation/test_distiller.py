"""The distillation losses, against numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy_distiller import GROUPS, POSITIONS, WIDE, WIDE_GROUPS, features, margins, matched, mean_square, partial_l2

from mgd_det.distillation import Distiller, Padding, Position, box_mask, score_mask
from mgd_det.distillation.position_losses import POSITION_LOSS_REGISTRY
from mgd_det.errors import ArgumentError, UserError, named_as
from mgd_det.modeling.mgd_backbone import config_key

# ------------------------------------------------------------------ the same in numpy


def group_norm(x, layer):
    images, channels, height, width = x.shape
    grouped = x.reshape(images, layer.num_groups, -1)
    grouped = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + layer.eps)
    weight, bias = (v.detach().double().numpy().reshape(1, -1, 1, 1) for v in (layer.weight, layer.bias))
    return grouped.reshape(x.shape) * weight + bias


def batch_norm(x, layer):
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    weight, bias = (v.detach().double().numpy().reshape(1, -1, 1, 1) for v in (layer.weight, layer.bias))
    return (x - mean) / np.sqrt(var + layer.eps) * weight + bias


def reduced(teacher, margin, groups):
    """AMP, which of one member is that member."""
    members = teacher[:, groups]  # (B, Cs, K, H, W)
    largest = np.abs(members).argmax(axis=2)
    return np.take_along_axis(members, largest[:, :, None], axis=2)[:, :, 0], margin[groups].mean(axis=1)


def squared_errors(student, target, margin):
    target = np.maximum(target, margin.reshape(1, -1, 1, 1))
    return np.where((student > target) | (target > 0), (student - target) ** 2, 0)


def errors_of(distiller, p, student, teacher, scale="mean"):
    """Squared errors of the student's values behind the norm layer; with scale "target" of a target of RMS 1."""
    x, t = (f.detach().double().numpy() for f in (student[p.student], teacher[p.teacher]))
    layer = distiller.norms[p.name]
    if isinstance(layer, nn.GroupNorm):
        x = group_norm(x, layer)
    elif isinstance(layer, nn.BatchNorm2d):
        x = batch_norm(x, layer)
    groups = distiller.groups(p).numpy()
    rows = groups[:, 0] >= 0
    target, margin = reduced(t, distiller.margin(p).double().numpy(), groups[rows])
    rms = mean_square(p).item() ** 0.5 if scale == "target" else 1
    return squared_errors(x[:, rows], target / rms, margin / rms)


def scaled(errors, scale, p):
    if scale in ("mean", "target"):
        return errors.mean()
    # the authors: the sum over a GPU's images, over all GPUs' images and the factor; DDP's mean over 8 GPUs
    factor = {"res2": 5e7, "res5": 5e6, "p5": 5e5}[p.teacher]
    return errors.sum() / (8 * errors.shape[0]) / factor


# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
@pytest.mark.parametrize("reducer", ["amp", "sm"])
@pytest.mark.parametrize("scale", ["mean", "target", "authors"])
def test_loss_of_every_reducer_and_scale(reducer, scale, norm):
    distiller = matched(reducer=reducer, scale=scale, norm=norm, norm_groups=2)
    student, teacher = features()
    losses = distiller(student, teacher)
    assert list(losses) == ["loss_mgd_res2", "loss_mgd_res5"]
    for p in POSITIONS:
        loss = losses[f"loss_mgd_{p.name}"]
        assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad == (norm != "")
        errors = errors_of(distiller, p, student, teacher, scale)
        assert loss.item() == pytest.approx(scaled(errors, scale, p), rel=1e-4)


@pytest.mark.parametrize("scale", ["mean", "target", "authors"])
def test_loss_of_random_drop_is_that_of_one_member_and_one_margin(scale):
    """At a single pixel there are K members x K margins to draw, and so K * K losses."""
    p = Position("res2", "res2", 1, 2)
    distiller = matched([p], {"res2": torch.tensor([[1, 0]])}, reducer="rd", scale=scale, norm="")
    student = torch.full((1, 1, 1, 1), 2.0)
    teacher = torch.tensor([-3.0, 0.3]).view(1, 2, 1, 1)
    margin = margins(p).double().numpy()
    candidates = []
    rms = mean_square(p).item() ** 0.5 if scale == "target" else 1
    for member in (1, 0):
        for owner in (1, 0):
            target = max(teacher[0, member, 0, 0].item(), margin[owner])
            candidates.append(scaled(np.array([[(2.0 - target / rms) ** 2]]), scale, p))
    torch.manual_seed(0)
    found = [distiller({"res2": student}, {"res2": teacher})["loss_mgd_res2"].item() for _ in range(200)]
    nearest = [int(np.argmin([abs(loss - c) for c in candidates])) for loss in found]
    np.testing.assert_allclose(found, [candidates[i] for i in nearest], rtol=1e-5)
    # two of the four agree: 0.3 lies above both margins
    distinct = {round(c / max(candidates), 6) for c in candidates}
    assert len({round(c / max(candidates), 6) for c in found}) == len(distinct) == 3


def test_loss_of_random_drop_where_a_group_agrees():
    """All members of a group alike: RD and AMP are one."""
    student, teacher = features()
    for p in POSITIONS:
        for group in GROUPS[p.name]:
            teacher[p.teacher][:, group] = teacher[p.teacher][:, group[:1]]
    distillers = [matched(reducer=reducer, norm="GN", norm_groups=1) for reducer in ("amp", "rd")]
    for distiller in distillers:
        for p in POSITIONS:
            distiller.margin(p).fill_(-0.4)
    amp, rd = (distiller(student, teacher) for distiller in distillers)
    assert amp.keys() == rd.keys()
    for name in amp:
        torch.testing.assert_close(amp[name], rd[name])


@pytest.mark.parametrize("weights, each", [((2.5,), (2.5, 2.5)), ((0.5, 4.0), (0.5, 4.0)), ((0, 3), (0, 3))])
def test_weights(weights, each):
    student, teacher = features()
    plain, weighted = matched(norm="")(student, teacher), matched(norm="", weights=weights)(student, teacher)
    for p, weight in zip(POSITIONS, each):
        name = f"loss_mgd_{p.name}"
        assert (name in weighted) == (weight > 0)
        if weight > 0:
            assert weighted[name].item() == pytest.approx(weight * plain[name].item(), rel=1e-6)


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("scale", ["mean", "target", "authors"])
def test_repeating_the_batch_changes_nothing(scale, norm):
    distiller = matched(scale=scale, norm=norm)
    student, teacher = features()
    twice = [{name: torch.cat([x, x]) for name, x in f.items()} for f in (student, teacher)]
    once, doubled = distiller(student, teacher), distiller(*twice)
    for name in once:
        torch.testing.assert_close(doubled[name], once[name], rtol=1e-5, atol=0)


def training_on(louder, loss, reducer):
    """Losses, and gradients of student and norm layers, of 5 steps on a teacher ``louder`` times as loud."""
    distiller = matched(losses={loss: {"weights": 0.5, "scale": "target"}}, reducer=reducer)
    student, teacher = features()
    teacher = {name: louder * x for name, x in teacher.items()}
    for p in POSITIONS:
        groups = distiller.groups(p)
        square = louder**2 * mean_square(p)
        distiller.set_matching(p, groups=groups, margin=louder * margins(p), mean_square=square)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    values = []
    for step in range(5):
        maps = {name: x.clone().requires_grad_() for name, x in student.items()}
        torch.manual_seed(step)  # of random drop
        losses = distiller(maps, teacher)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values += [
            *losses.values(),
            *(x.grad for x in maps.values()),
            *(x.grad.clone() for x in distiller.parameters()),
        ]
    return values


@pytest.mark.parametrize("reducer", ["amp", "sm", "rd"])
@pytest.mark.parametrize("loss", ["partial_l2", "l2"])
@pytest.mark.parametrize("louder", [0.05, 30.0])
def test_losses_gradients_and_norms_do_not_depend_on_the_teachers_scale(louder, loss, reducer):
    expected = training_on(1.0, loss, reducer)
    assert len(expected) == 5 * (2 + 2 + 4)
    for value, as_before in zip(training_on(louder, loss, reducer), expected):
        assert value.abs().sum() > 0
        torch.testing.assert_close(value, as_before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["mean", "target"])
def test_tiling_the_map_changes_nothing(scale):
    distiller = matched(scale=scale, norm="GN")
    student, teacher = features()
    tiled = [{name: x.repeat(1, 1, 2, 3) for name, x in f.items()} for f in (student, teacher)]
    once, larger = distiller(student, teacher), distiller(*tiled)
    for name in once:
        torch.testing.assert_close(larger[name], once[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize("teacher_feature, factor", [("res2", 5e7), ("res3", 5e7), ("res4", 5e6), ("res5", 5e6)])
def test_the_authors_factors(teacher_feature, factor):
    """16 images on 8 GPUs, theirs: each GPU's sum / 16 / factor; the gradients are averaged over the 8."""
    p = Position("a", teacher_feature, 2, 4)
    distiller = matched([p], {"a": torch.tensor([[0, 1], [2, 3]])}, scale="authors", norm="")
    student = torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(16, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    theirs = []
    for gpu in range(8):
        share = slice(2 * gpu, 2 * gpu + 2)
        errors = errors_of(distiller, p, {"a": student[share]}, {teacher_feature: teacher[share]})
        theirs.append(errors.sum() / 16 / factor)
    ours = distiller({"a": student}, {teacher_feature: teacher})["loss_mgd_a"].item()
    assert ours == pytest.approx(np.mean(theirs), rel=1e-4)


def test_student_and_teacher_names_may_differ():
    p = Position("res2.expansion", "res3", 3, 7)
    distiller = matched([p], {p.name: GROUPS["res2"]}, norm="")
    student, teacher = features(positions=[p])
    losses = distiller(student, teacher)
    assert list(losses) == ["loss_mgd_res2_expansion"]
    expected = errors_of(distiller, p, student, teacher, "target").mean()
    assert losses["loss_mgd_res2_expansion"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reducer", ["amp", "sm", "rd"])
@pytest.mark.parametrize("scale", ["mean", "target", "authors"])
def test_student_channels_without_a_teacher_take_no_part(reducer, scale):
    distiller = matched([WIDE], WIDE_GROUPS, reducer=reducer, scale=scale, norm="")
    student, teacher = features(positions=[WIDE])
    x = student["res2"].requires_grad_()
    loss = distiller(student, teacher)["loss_mgd_res2"]
    errors = errors_of(distiller, WIDE, student, teacher, scale)
    assert loss.item() == pytest.approx(scaled(errors, scale, WIDE), rel=1e-5)
    loss.backward()
    moved = x.grad.abs().sum(dim=(0, 2, 3)) > 0
    assert moved.tolist() == [False, True, True, False, True]
    louder = x.detach().clone()
    louder[:, [0, 3]] = 1e3
    assert torch.equal(distiller({"res2": louder}, teacher)["loss_mgd_res2"], loss)
    louder[:, 1] += 1
    assert not torch.equal(distiller({"res2": louder}, teacher)["loss_mgd_res2"], loss)


def test_other_channels_may_be_left_without_a_group_after_an_update():
    distiller = matched([WIDE], WIDE_GROUPS, norm="")
    student, teacher = features(positions=[WIDE])
    groups = torch.tensor([[1], [-1], [-1], [0], [2]])
    distiller.set_matching(WIDE, groups=groups, margin=margins(WIDE), mean_square=mean_square(WIDE))
    expected = errors_of(distiller, WIDE, student, teacher, "target").mean()
    assert distiller(student, teacher)["loss_mgd_res2"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0], [1], [2]], [[0, 1], [2, 3], [-1, -1]]])
def test_groups_of_another_shape_or_number_are_refused(groups):
    distiller = matched()
    before = distiller.distillation_state()["matchings"]["res2"]
    p = POSITIONS[0]
    with pytest.raises(ValueError, match="groups at res2"):
        distiller.set_matching(p, groups=torch.tensor(groups), margin=margins(p) - 1, mean_square=mean_square(p))
    after = distiller.distillation_state()["matchings"]["res2"]
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_matchings_tensors_have_their_shapes_from_the_start():
    for positions in (POSITIONS, [WIDE]):
        before = {name: x.shape for name, x in Distiller(positions).named_buffers()}
        groups = GROUPS if positions is POSITIONS else WIDE_GROUPS
        assert {name: x.shape for name, x in matched(positions, groups).named_buffers()} == before


def test_gradient_reaches_the_student_and_the_norms_but_not_the_teacher():
    distiller = matched()
    student, teacher = features()
    for x in (*student.values(), *teacher.values()):
        x.requires_grad_()
    sum(distiller(student, teacher).values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in student.values())
    assert all(x.grad is None for x in teacher.values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.parameters())


@pytest.mark.parametrize("scale", ["mean", "target", "authors"])
def test_half_features_give_a_float32_loss(scale):
    distiller = matched(scale=scale, norm="")
    student, teacher = features()
    halves = [{name: x.half() for name, x in f.items()} for f in (student, teacher)]
    expected = distiller(*[{name: x.float() for name, x in f.items()} for f in halves])
    for name, loss in distiller(*halves).items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=0)


def test_under_autocast_the_loss_is_float32():
    distiller = matched(norm="GN")
    student, teacher = features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distiller(student, teacher)
    for name, loss in distiller(student, teacher).items():
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], loss, rtol=1e-2, atol=0)


@pytest.mark.parametrize("positions, groups", [(POSITIONS, GROUPS), ([WIDE], WIDE_GROUPS)])
def test_a_step_asks_nothing_of_the_device(positions, groups):
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    losses = {name: {} for name, loss in POSITION_LOSS_REGISTRY if len(positions) > 1 or not loss.needs_following}
    distiller = matched(positions, groups, losses=losses, norm="GN", norm_groups=1)
    student, teacher = features(positions=positions)
    for x in student.values():
        x.requires_grad_()
    padding = Padding([(48, 64), (40, 50)], (48, 64))
    scores, boxes = torch.rand(2, 1, 6, 8), [torch.tensor([[3.0, 4.0, 20.0, 30.0]])] * 2
    with Refusing():
        sum(distiller(student, teacher).values()).backward()
        for mask in (box_mask(boxes, padding, (6, 8)), score_mask(scores, padding)):
            sum(distiller(student, teacher, masks={"res2": mask}).values()).backward()
        with pytest.raises(AssertionError):
            teacher[positions[0].teacher].max().item()


def test_an_empty_batch_costs_0():
    for scale in ("mean", "target", "authors"):
        losses = matched(scale=scale, norm="")(*features(images=0))
        assert [loss.item() for loss in losses.values()] == [0, 0]


def test_a_silent_teacher_divides_by_one():
    p = POSITIONS[0]
    distiller = Distiller([p], norm="", losses=partial_l2())
    distiller.set_matching(p, groups=GROUPS["res2"], margin=margins(p), mean_square=torch.zeros(()))
    assert distiller.mean_square(p).item() == 1


# ------------------------------------------------------------------ before the matching


def test_before_the_first_matching():
    distiller = Distiller(POSITIONS)
    assert not distiller.is_matched
    with pytest.raises(RuntimeError, match="MatchingUpdate"):
        distiller(*features())
    p = POSITIONS[0]
    distiller.set_matching(p, groups=GROUPS["res2"], margin=margins(p), mean_square=mean_square(p))
    assert not distiller.is_matched
    with pytest.raises(RuntimeError, match="MatchingUpdate"):
        distiller(*features())


# ------------------------------------------------------------------ config values


@pytest.mark.parametrize(
    "options, key, value",
    [
        ({"reducer": "max"}, "MODEL.MGD.REDUCER", "'max'"),
        ({"reducer": "AMP"}, "MODEL.MGD.REDUCER", "'AMP'"),
        ({"scale": "sum"}, "MODEL.MGD.LOSS.PARTIAL_L2.SCALE", "'sum'"),
        ({"norm": "InstanceNorm"}, "MODEL.MGD.NORM", "'InstanceNorm'"),
        ({"norm_groups": 0}, "MODEL.MGD.NORM_GROUPS", "0"),
        ({"norm_groups": -32}, "MODEL.MGD.NORM_GROUPS", "-32"),
        ({"norm_groups": 32.0}, "MODEL.MGD.NORM_GROUPS", "32.0"),
        ({"weights": ()}, "MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "[]"),
        ({"weights": (1.0, 2.0, 3.0)}, "MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "3.0"),
        ({"weights": (1.0, -2.0)}, "MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "-2.0"),
        ({"weights": (float("nan"),)}, "MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "nan"),
        ({"weights": (float("inf"),)}, "MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "inf"),
        ({"weights": ("heavy",)}, "MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "heavy"),
        ({"losses": {"pkd": {"weights": "heavy"}}}, "MODEL.MGD.LOSS.PKD.WEIGHTS", "heavy"),
        ({"losses": {"cwd": {"warmth": 2.0}}}, "MODEL.MGD.LOSS.CWD.WARMTH", "weights, decay, temperature"),
        ({"losses": {"pkd": {"power": 2.0}}}, "MODEL.MGD.LOSS.PKD.POWER", "weights"),
        ({"losses": {"at": {"power": "2"}}}, "MODEL.MGD.LOSS.AT.POWER", "'2'"),
        ({"losses": {"kl": {"weights": [1.0]}}}, "MODEL.MGD.LOSS.NAMES", "'kl'"),
        ({"losses": {"pkd": {"weights": [1.0, -1.0]}}}, "MODEL.MGD.LOSS.PKD.WEIGHTS", "-1.0"),
        ({"losses": {"l2": {"weights": [1.0], "scale": "authors"}}}, "MODEL.MGD.LOSS.L2.SCALE", "'authors'"),
        ({"losses": {"cwd": {"weights": [1.0], "temperature": 0}}}, "MODEL.MGD.LOSS.CWD.TEMPERATURE", "0"),
        ({"losses": {"at": {"weights": [1.0], "power": 0.5}}}, "MODEL.MGD.LOSS.AT.POWER", "0.5"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(options, key, value):
    with pytest.raises(UserError) as error, named_as(config_key):
        matched(**options)
    assert key in str(error.value) and value in str(error.value)


def test_no_position_at_all():
    """It would train the plain student and say nothing."""
    with pytest.raises(ArgumentError, match="positions is empty"):
        Distiller([])


def test_the_authors_have_no_factor_for_other_features():
    with pytest.raises(ArgumentError, match="losses.partial_l2.scale.*'stage7'.*res2"):
        Distiller([Position("res2", "stage7", 3, 7)], losses=partial_l2(scale="authors"))
    Distiller([Position("stage7", "res2", 3, 7)], losses=partial_l2(scale="authors"))
