"""Distillation under mixed precision, and by batches whose gradients are accumulated."""

import pytest
import torch
import toy_distiller

from mgd_det.distillation import Distiller, MatchingStatistics, Position
from mgd_det.distillation.teacher import _mark_overflow

POSITION = Position("res3", "res3", 6, 14)
LARGE = 1e4  # its square is no float16


def features(images=4, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(images, 6, 9, 7, generator=generator)
    teacher = torch.randn(images, 14, 9, 7, generator=generator) * scale
    return {"res3": student}, {"res3": teacher}


def matched(loss, reducer="amp", **options):
    torch.manual_seed(1)
    losses = {loss: {"weights": (1.0,), **options}}
    distiller = Distiller([POSITION], norm_groups=3, reducer=reducer, losses=losses)
    size = 1 if reducer == "sm" else 2
    groups = torch.randperm(14)[: 6 * size].view(6, size)
    distiller.set_matching(POSITION, groups=groups, margin=-torch.rand(14), mean_square=torch.tensor(1.5))
    for parameter in distiller.parameters():
        torch.nn.init.uniform_(parameter, 0.3, 1.2)
    return distiller


def loss_and_gradients(distiller, student, teacher):
    distiller.zero_grad()
    student = {name: x.detach().clone().requires_grad_() for name, x in student.items()}
    (loss,) = distiller(student, teacher).values()
    loss.backward()
    norms = [parameter.grad.clone() for parameter in distiller.parameters()]
    return loss.detach(), [student["res3"].grad, *norms]


@pytest.mark.parametrize("reducer", ["amp", "rd", "sm"])
@pytest.mark.parametrize("loss", toy_distiller.LOSSES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_large_teacher_values_of_half_precision_do_not_overflow(loss, reducer, autocast):
    student, teacher = features(scale=LARGE)
    teacher["res3"][0, 0, 0, 0] = 65504
    teacher = {"res3": teacher["res3"].clamp(-65504, 65504).half()}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        value, gradients = loss_and_gradients(matched(loss, reducer), student, teacher)
    assert value.dtype == torch.float32 and value.isfinite() and value > 0
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("reducer", ["amp", "rd", "sm"])
@pytest.mark.parametrize("loss", toy_distiller.LOSSES)
def test_a_teacher_that_overflows_makes_the_loss_nan(loss, reducer, is_masked):
    student, teacher = features()
    half = {"res3": teacher["res3"].half()}
    half["res3"][2, :, 4, 3] = -torch.inf
    _mark_overflow(half)
    masks = {"res3": torch.ones(4, 1, 9, 7)} if is_masked else None
    (value,) = matched(loss, reducer)(student, half, masks=masks).values()
    assert value.isnan()


@pytest.mark.parametrize("loss", toy_distiller.LOSSES)
def test_a_teacher_of_half_precision_gives_the_loss_of_its_rounded_values(loss):
    student, teacher = features()
    half = {"res3": teacher["res3"].half()}
    value, gradients = loss_and_gradients(matched(loss), student, half)
    expected, theirs = loss_and_gradients(matched(loss), student, {"res3": half["res3"].float()})
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_matching_is_measured_under_autocast_as_without(dtype):
    student, teacher = features()
    results = []
    for enabled in (False, True):
        distiller = matched("partial_l2")
        measurement = MatchingStatistics(distiller, {"res3": None}, "measured")
        with torch.autocast("cpu", dtype, enabled=enabled):
            measurement.update(student, teacher)
            measurement.solve()
        results.append((measurement.cost(POSITION), distiller.distillation_state()["matchings"]["res3"]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-6)
    assert torch.equal(results[1][1]["groups"], results[0][1]["groups"])
    for name in ("margin", "mean_square"):
        torch.testing.assert_close(results[1][1][name], results[0][1][name])


# Of the others a mean or a correlation is over the batch, so that halves are no average.
@pytest.mark.parametrize("reducer", ["amp", "sm"])
@pytest.mark.parametrize(
    "loss, options",
    [
        ("partial_l2", {"scale": "target"}),
        ("partial_l2", {"scale": "mean"}),
        ("partial_l2", {"scale": "authors"}),
        ("l2", {"scale": "mean"}),
        ("cwd", {}),
        ("at", {}),
    ],
)
def test_the_halves_of_a_batch_average_to_the_whole(loss, options, reducer):
    student, teacher = features()
    whole, gradients = loss_and_gradients(matched(loss, reducer, **options), student, teacher)
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        part = [{name: x[half] for name, x in maps.items()} for maps in (student, teacher)]
        halves.append(loss_and_gradients(matched(loss, reducer, **options), *part))
    assert halves[0][0] != halves[1][0]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, whole)
    # A step on the mean of both losses.
    both = torch.cat([gradient[0] for _, gradient in halves]) / 2
    torch.testing.assert_close(both, gradients[0], rtol=1e-4, atol=1e-7)
    for of_norm, first, second in zip(gradients[1:], halves[0][1][1:], halves[1][1][1:]):
        torch.testing.assert_close((first + second) / 2, of_norm, rtol=1e-4, atol=1e-6)
