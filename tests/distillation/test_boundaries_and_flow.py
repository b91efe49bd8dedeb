"""Activation boundaries (AB) and the flow of solution procedure (FSP), against numpy."""

import numpy as np
import oracles
import pytest
import torch
import toy_distiller

from mgd_det.distillation import Distiller, MatchingStatistics, Position, activation_boundary, fsp_matrix
from mgd_det.errors import ArgumentError


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def boundary_by_numpy(student, target, margin):
    """As in the paper: an indicator of the teacher's activity, and a hinge on each side."""
    active = (target > 0).astype(float)
    hinges = active * np.maximum(margin - student, 0) + (1 - active) * np.maximum(margin + student, 0)
    return np.mean(hinges**2), 2 * (hinges * (1 - 2 * active)) / student.size


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activation_boundary(margin, dtype):
    student, target = random(2, 3, 4, 5, seed=1).to(dtype).requires_grad_(), random(2, 3, 4, 5, seed=2).to(dtype)
    value = activation_boundary(student, target, margin)
    value.backward()
    expected, gradient = boundary_by_numpy(student.detach().double().numpy(), target.double().numpy(), margin)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(student.grad.double().numpy(), gradient, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_only_the_sign_of_the_teacher_counts():
    student, target = random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2)
    assert torch.equal(activation_boundary(student, target), activation_boundary(student, target.sign() * 1e-3))
    assert activation_boundary(2 * target.sign(), target) == 0
    assert activation_boundary(student[:0], target[:0]) == 0
    with pytest.raises(ValueError, match="differ in shape"):
        activation_boundary(student, target[:, :2])


@pytest.mark.parametrize("masked", [False, True])
def test_fsp_matrix(masked):
    first, second = random(2, 3, 6, 8, seed=1), random(2, 5, 3, 4, seed=2)
    mask = random(2, 1, 3, 4, seed=3).abs() if masked else torch.ones(2, 1, 3, 4)
    matrix = fsp_matrix(first, second, mask if masked else None)
    assert matrix.shape == (2, 3, 5)
    expected = np.zeros((2, 3, 5))
    for b in range(2):
        for i in range(3):
            for j in range(5):
                for y in range(3):
                    for x in range(4):
                        largest = first[b, i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].max().item()
                        expected[b, i, j] += mask[b, 0, y, x].item() * largest * second[b, j, y, x].item()
        expected[b] /= mask[b].sum().item()
    np.testing.assert_allclose(matrix.numpy(), expected, rtol=1e-9)
    turned = fsp_matrix(second, first, mask if masked else None)  # whichever of the two is smaller
    np.testing.assert_allclose(turned.transpose(1, 2).numpy(), expected, rtol=1e-9)


def test_fsp_matrix_under_autocast_is_of_float32():
    first, second = random(2, 3, 6, 8, seed=1).float(), random(2, 5, 6, 8, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        matrix = fsp_matrix(first.bfloat16(), second.bfloat16())
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix, fsp_matrix(first.bfloat16().float(), second.bfloat16().float()))


P2, P3, P4 = (Position(name, name, *channels) for name, channels in (("p2", (2, 5)), ("p3", (3, 6)), ("p4", (4, 4))))
GROUPS = {
    "p2": torch.tensor([[4, 0], [1, 3]]),
    "p3": torch.tensor([[5, 1], [0, 2], [4, 3]]),
    "p4": torch.tensor([[2], [0], [3], [1]]),
}
SIZES = {"p2": (4, 6), "p3": (4, 6), "p4": (2, 3)}


def distiller(losses, positions=(P2, P3, P4)):
    made = Distiller(positions, norm_groups=1, losses=losses)
    for p in made.matched_positions:
        options = {"margin": -torch.ones(p.teacher_channels), "mean_square": torch.tensor(1.0)}
        made.set_matching(p, groups=GROUPS[p.name], **options)
    for parameter in made.parameters():
        torch.nn.init.uniform_(parameter, 0.3, 1.2)
    return made


def features():
    student, teacher = {}, {}
    for i, p in enumerate((P2, P3, P4)):
        student[p.name] = random(2, p.student_channels, *SIZES[p.name], seed=i).float()
        teacher[p.name] = random(2, p.teacher_channels, *SIZES[p.name], seed=9 + i, scale=4).float()
    return student, teacher


def target(teacher, name):
    channels = teacher[name].shape[1]
    return oracles.absolute_max_pooling(teacher[name].numpy(), np.zeros(channels), GROUPS[name].numpy())[0]


def pooled(x, size):
    images, channels, height, width = x.shape
    blocks = x.reshape(images, channels, size[0], height // size[0], size[1], width // size[1])
    return blocks.max(axis=(3, 5))


def test_ab_of_a_position_is_of_the_normed_student_and_the_reduced_teacher():
    made, (student, teacher) = distiller({"ab": {"weights": [2.0, 0.0, 1.0], "margin": 0.5}}), features()
    losses = made(student, teacher)
    assert list(losses) == ["loss_ab_p2", "loss_ab_p4"] and list(made.norms) == ["p2", "p4"]
    normed = made.norms["p2"](student["p2"]).detach().double().numpy()
    expected, _ = boundary_by_numpy(normed, target(teacher, "p2"), 0.5)
    assert losses["loss_ab_p2"].item() == pytest.approx(2 * expected, rel=1e-5)


def test_fsp_of_a_position_is_with_the_next_one():
    made, (student, teacher) = distiller({"fsp": {"weights": [1.0, 3.0, 7.0]}}), features()
    losses = made(student, teacher)
    assert list(losses) == ["loss_fsp_p2", "loss_fsp_p3"]
    normed = {name: made.norms[name](x).detach().double().numpy() for name, x in student.items()}
    unit = {name: target(teacher, name) for name in student}
    unit = {name: x / np.sqrt((x**2).mean()) for name, x in unit.items()}
    for weight, (here, after) in zip((1, 3), (("p2", "p3"), ("p3", "p4"))):
        matrices = []
        for of in (normed, unit):
            maps = [pooled(of[name], SIZES[after]) for name in (here, after)]
            matrices.append(np.einsum("bihw,bjhw->bij", *maps) / np.prod(SIZES[after]))
        expected = weight * ((matrices[0] - matrices[1]) ** 2).mean()
        assert losses[f"loss_fsp_{here}"].item() == pytest.approx(expected, rel=1e-5)


def test_fsp_reads_and_trains_both_positions_of_a_pair_and_no_other():
    made = distiller({"fsp": {"weights": [0.0, 1.0, 0.0]}})
    student, teacher = features()
    assert made.matched_positions == [P3, P4] and list(made.norms) == ["p3", "p4"]
    for x in student.values():
        x.requires_grad_()
    (loss,) = made(student, teacher).values()
    loss.backward()
    assert student["p2"].grad is None and all((student[name].grad != 0).any() for name in ("p3", "p4"))
    assert all(p.grad is not None for p in made.parameters())  # DistributedDataParallel waits for each


def test_fsp_pools_a_mask_of_its_own_from_neither_map():
    """The mask is that of the smaller map, whichever position it is of."""
    made, (student, teacher) = distiller({"fsp": {}}, [P4, P3]), features()
    mask = torch.rand(2, 1, *SIZES["p4"])
    masked = made(student, teacher, masks={"p4": mask, "p3": torch.full((2, 1, *SIZES["p3"]), float("nan"))})
    assert masked["loss_fsp_p4"].isfinite() and masked["loss_fsp_p4"] != made(student, teacher)["loss_fsp_p4"]


def test_fsp_of_a_measured_matching_and_of_channels_without_a_teacher():
    wide = Position("p3", "p3", 6, 3)
    made = Distiller([P2, wide], norm_groups=1, losses={"fsp": {}})
    student, teacher = features()
    student["p3"], teacher["p3"] = random(2, 6, 4, 6).float(), random(2, 3, 4, 6, seed=5).float()
    statistics = MatchingStatistics(made, {"p2": None, "p3": None}, "measured")
    statistics.update(student, teacher)
    assert [report.position for report in statistics.solve()] == [P2, wide]
    assert made(student, teacher)["loss_fsp_p2"].isfinite()
    other = Distiller([P2, wide], norm_groups=1, losses={"fsp": {}})
    other.load_distillation_state(made.distillation_state())
    assert torch.equal(other(student, teacher)["loss_fsp_p2"], made(student, teacher)["loss_fsp_p2"])


@pytest.mark.parametrize("value", [0.0, 5.0])
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_constant_maps_have_finite_losses_and_gradients(of, value):
    made = distiller({"fsp": {}, "ab": {}})
    student, teacher = features()
    constant = student if of == "student" else teacher
    constant.update((name, torch.full_like(x, value)) for name, x in list(constant.items()))
    for x in student.values():
        x.requires_grad_()
    losses = made(student, teacher)
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values()) and all(x.grad.isfinite().all() for x in student.values())


def test_what_cannot_be_computed_is_named():
    with pytest.raises(ArgumentError, match="losses names 'fsp'.*one only .p2"):
        Distiller([P2], losses={"fsp": {}})
    off = distiller({"fsp": {"weights": 0.0}, "ab": {}}, [P2])
    assert list(off(*features())) == ["loss_ab_p2"]
    for margin in (0.0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="losses.ab.margin is"):
            Distiller([P2], losses={"ab": {"margin": margin}})


def test_an_empty_batch():
    losses = toy_distiller.matched(losses={"fsp": {}, "ab": {}}, norm="")(*toy_distiller.features(images=0))
    assert {name: x.item() for name, x in losses.items()} == dict.fromkeys(losses, 0)
