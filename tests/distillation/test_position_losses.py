"""Several losses at once in a distiller: which are computed where, on what, and under which name."""

import numpy as np
import oracles
import pytest
import torch

from mgd_det.distillation import (
    POSITION_LOSS_REGISTRY,
    Distiller,
    MatchingStatistics,
    Position,
    PositionLoss,
    attention_transfer,
    channel_wise_kl,
    pearson_distance,
    plain_l2,
    register_position_loss,
)

RES4, P3 = Position("res4", "res4", 2, 5), Position("p3", "p3", 4, 4)
GROUPS = {"res4": torch.tensor([[4, 0], [1, 3]]), "p3": torch.tensor([[2], [0], [3], [1]])}
MEAN_SQUARE = {"res4": torch.tensor(0.25), "p3": torch.tensor(4.0)}


def distiller(losses, positions=(RES4, P3), groups=GROUPS):
    result = Distiller(positions, norm_groups=2, losses=losses)
    for p in result.matched_positions:
        result.set_matching(
            p, groups=groups[p.name], margin=-torch.ones(p.teacher_channels), mean_square=MEAN_SQUARE[p.name]
        )
    for parameter in result.parameters():
        torch.nn.init.uniform_(parameter, 0.3, 1.2)
    return result


def features(positions=(RES4, P3)):
    generator = torch.Generator().manual_seed(0)
    student = {p.student: torch.randn(2, p.student_channels, 4, 3, generator=generator) for p in positions}
    teacher = {p.teacher: torch.randn(2, p.teacher_channels, 4, 3, generator=generator) for p in positions}
    return student, teacher


def target(teacher, groups):
    """AMP by numpy, without margin."""
    reduced, _ = oracles.absolute_max_pooling(teacher.numpy(), torch.zeros(teacher.shape[1]).numpy(), groups.numpy())
    return torch.from_numpy(reduced).float()


def test_each_loss_sees_what_it_should_and_has_a_name_of_its_own():
    losses = {
        "partial_l2": {"weights": [3.0, 0.0]},
        "l2": {"weights": [2.0, 0.0], "scale": "mean"},
        "cwd": {"weights": [0.5, 5.0], "temperature": 2.0},
        "pkd": {"weights": [0.0, 6.0]},
        "at": {"weights": [10.0, 0.0], "power": 2.0},
    }
    made = distiller(losses)
    student, teacher = features()
    results = made(student, teacher)
    names = ["loss_mgd_res4", "loss_l2_res4", "loss_cwd_res4", "loss_cwd_p3", "loss_pkd_p3", "loss_at_res4"]
    assert list(results) == names
    normed = {name: norm(student[name]) for name, norm in made.norms.items()}
    targets = {name: target(teacher[name], groups) for name, groups in GROUPS.items()}
    expected = {
        "loss_l2_res4": 2 * plain_l2(normed["res4"], targets["res4"]),
        "loss_cwd_res4": 0.5 * channel_wise_kl(normed["res4"], targets["res4"], 2.0),
        "loss_cwd_p3": 5 * channel_wise_kl(normed["p3"], targets["p3"], 2.0),
        "loss_pkd_p3": 6 * pearson_distance(student["p3"], targets["p3"]),
        "loss_at_res4": 10 * attention_transfer(student["res4"], teacher["res4"]),
    }
    for name, value in expected.items():
        assert results[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert results["loss_mgd_res4"] > 0


def test_l2_has_the_scale_of_the_target():
    student, teacher = features()
    scaled = distiller({"l2": {"weights": [1.0], "scale": "target"}})
    losses = scaled(student, teacher)
    for name, groups in GROUPS.items():
        of_teacher = target(3 * teacher[name], groups).numpy()
        error = scaled.norms[name](student[name]).detach().numpy() - of_teacher / np.sqrt((of_teacher**2).mean())
        assert losses[f"loss_l2_{name}"].item() == pytest.approx((error**2).mean(), rel=1e-5)
    silent = {name: torch.zeros_like(x) for name, x in teacher.items()}
    assert all(torch.isfinite(loss) for loss in distiller({"l2": {"weights": [1.0]}})(student, silent).values())


def test_channels_without_a_teacher_channel_take_no_part():
    wide = Position("res4", "res4", 4, 2)
    groups = {"res4": torch.tensor([[1], [-1], [0], [-1]])}
    names = ("l2", "cwd", "pkd", "at")
    made = distiller({name: {"weights": [1.0]} for name in names}, [wide], groups)
    student, teacher = features([wide])
    student["res4"].requires_grad_()
    results = made(student, teacher)
    expected = pearson_distance(student["res4"][:, [0, 2]], teacher["res4"][:, [1, 0]])
    assert results["loss_pkd_res4"].item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(results["loss_pkd_res4"], student["res4"])
    assert (gradient[:, [1, 3]] == 0).all() and (gradient[:, [0, 2]] != 0).any()


def test_norm_layers_are_only_where_a_loss_trains_them():
    """DistributedDataParallel waits for the gradient of every parameter."""
    made = distiller({"partial_l2": {"weights": [1.0, 0.0]}, "pkd": {"weights": [0.0, 1.0]}})
    assert list(made.norms) == ["res4"]
    sum(made(*features()).values()).backward()
    assert all(p.grad is not None for p in made.parameters())


def test_attention_transfer_alone_needs_no_matching():
    made = Distiller([RES4], losses={"at": {"weights": [1.0]}})
    assert made.is_matched and made.matched_positions == []
    assert list(made(*features([RES4]))) == ["loss_at_res4"]
    assert MatchingStatistics(made, {}).solve() == []
    other = Distiller([RES4], losses={"at": {"weights": [1.0]}})
    other.load_distillation_state(made.distillation_state())


def test_only_positions_with_a_matched_loss_are_measured():
    made = Distiller([RES4, P3], losses={"at": {"weights": [1.0]}, "pkd": {"weights": [0.0, 1.0]}})
    assert made.matched_positions == [P3] and not made.is_matched
    measurement = MatchingStatistics(made, {"p3": None})
    measurement.update(*features())
    assert [report.position for report in measurement.solve()] == [P3]
    assert made.is_matched and set(made(*features())) == {"loss_at_res4", "loss_at_p3", "loss_pkd_p3"}


def test_a_loss_of_ones_own():
    @register_position_loss("cosine")
    class Cosine(PositionLoss):
        def __init__(self, *, power=1.0):
            self.power = power

        def __call__(self, position, features):
            return (1 - torch.cosine_similarity(features.matched, features.target, dim=1)).pow(self.power).mean()

    try:
        made = distiller({"cosine": {"weights": [2.0], "power": 2.0}})
        student, teacher = features()
        value = made(student, teacher)["loss_cosine_p3"]
        expected = (1 - torch.cosine_similarity(student["p3"], target(teacher["p3"], GROUPS["p3"]), dim=1)) ** 2
        assert value.item() == pytest.approx(2 * expected.mean().item(), rel=1e-5)
        with pytest.raises(AssertionError, match="cosine.*already"):
            register_position_loss("cosine")(Cosine)
    finally:
        POSITION_LOSS_REGISTRY._obj_map.pop("cosine")
