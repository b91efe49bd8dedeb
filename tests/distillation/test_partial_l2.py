"""The partial L2 distance, against numpy and against cases worked out by hand."""

import numpy as np
import pytest
import torch

from mgd_det.distillation import partial_l2

MARGIN = torch.tensor([-0.5, -0.1, -2.0])


def pair(seed=0, images=2, size=(4, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (images, len(MARGIN), *size)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def loss_by_loops(student, target, margin):
    student, target, margin = (x.double().numpy() for x in (student, target, margin))
    loss = np.zeros(student.shape)
    for index in np.ndindex(*student.shape):
        s, t = student[index], max(target[index], margin[index[1]])
        if s > t or t > 0:
            loss[index] = (s - t) ** 2
    return loss


@pytest.mark.parametrize(
    "student, target, loss",
    [
        (3.0, 1.0, 4.0),  # too loud, teacher active
        (0.5, 2.0, 2.25),  # too quiet, teacher active
        (-1.0, 2.0, 9.0),  # silent, teacher active
        (1.0, -0.25, 1.5625),  # too loud, teacher silent
        (-0.125, -0.25, 0.015625),  # silent, but not enough
        (-0.375, -0.25, 0.0),  # more silent than a silent teacher: right
        (-9.0, -0.25, 0.0),
        (1.0, -8.0, 2.25),  # the target counts as the margin, -0.5
        (-0.25, -8.0, 0.0625),
        (-0.75, -8.0, 0.0),  # below the margin, above the target: right
        (-0.5, -8.0, 0.0),  # at the margin
        (1.0, 0.0, 1.0),  # a target of 0 is silent
        (-1.0, 0.0, 0.0),
        (2.0, 2.0, 0.0),
    ],
)
def test_case(student, target, loss):
    tensors = [torch.full((1, 1, 1, 1), value) for value in (student, target)]
    for reduction in ("none", "mean", "sum"):
        assert partial_l2(*tensors, torch.tensor([-0.5]), reduction).item() == pytest.approx(loss)


def test_every_reduction():
    student, target = pair()
    expected = loss_by_loops(student, target, MARGIN)
    assert 0 < (expected > 0).sum() < expected.size
    none = partial_l2(student, target, MARGIN, "none")
    assert none.shape == student.shape
    np.testing.assert_allclose(none.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert partial_l2(student, target, MARGIN, "mean").item() == pytest.approx(expected.mean(), rel=1e-5)
    assert partial_l2(student, target, MARGIN, "sum").item() == pytest.approx(expected.sum(), rel=1e-5)
    assert partial_l2(student, target, MARGIN).item() == pytest.approx(expected.sum(), rel=1e-5)


def test_the_margin_of_each_channel_is_its_own():
    student, target = torch.zeros(1, 3, 1, 1), torch.full((1, 3, 1, 1), -9.0)
    assert partial_l2(student, target, MARGIN, "none").flatten().tolist() == pytest.approx([0.25, 0.01, 4.0])


def test_gradient_is_that_of_the_loss():
    student, target = pair(1, size=(3, 3), dtype=torch.float64)
    margin = MARGIN.double()
    t = torch.maximum(target, margin.view(1, -1, 1, 1))
    near = (student - t).abs() < 0.01  # finite differences do not know the mask's edge
    student = torch.where(near, t + 0.1, student).requires_grad_()
    for reduction in ("none", "mean", "sum"):
        assert torch.autograd.gradcheck(lambda s, r=reduction: partial_l2(s, target, margin, r), (student,))


def test_gradient_by_hand_and_none_for_the_teacher():
    student = torch.tensor([3.0, 0.5, -1.0, -0.375, -0.75]).view(1, 1, 1, 5).requires_grad_()
    target = torch.tensor([1.0, 2.0, 2.0, -0.25, -8.0]).view(1, 1, 1, 5).requires_grad_()
    margin = torch.tensor([-0.5])
    partial_l2(student, target, margin, "sum").backward()
    assert student.grad.flatten().tolist() == pytest.approx([4.0, -3.0, -6.0, 0.0, 0.0])
    assert target.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype):
    student, target = pair(dtype=dtype)
    expected = loss_by_loops(student, target, MARGIN)
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        loss = partial_l2(student, target, MARGIN, reduction)
        assert loss.dtype == torch.float32
        np.testing.assert_allclose(loss.numpy(), value, rtol=1e-5, atol=1e-7)


def test_a_half_student_with_a_full_target_and_the_reverse():
    student, target = pair()
    for s, t, margin in ((student.half(), target, MARGIN), (student, target.half(), MARGIN.half())):
        loss = partial_l2(s, t, margin)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(loss_by_loops(s, t, margin).sum(), rel=1e-5)


def test_large_halves_do_not_overflow():
    student = torch.full((2, 3, 8, 8), 300.0, dtype=torch.float16, requires_grad=True)
    target = torch.full((2, 3, 8, 8), -300.0, dtype=torch.float16)
    margin = torch.full((3,), -300.0)
    loss = partial_l2(student, target, margin, "mean")
    assert loss.item() == pytest.approx(600.0**2)
    assert partial_l2(student, target, margin, "sum").item() == pytest.approx(600.0**2 * 384)
    loss.backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_autocast_changes_nothing(reduction):
    student, target = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = partial_l2(student, target, MARGIN, reduction)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, partial_l2(student, target, MARGIN, reduction))


def test_float64_stays_float64():
    student, target = pair(dtype=torch.float64)
    loss = partial_l2(student, target, MARGIN.double())
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(loss_by_loops(student, target, MARGIN).sum(), rel=1e-12)


def test_repeating_the_batch_keeps_the_mean_and_doubles_the_sum():
    student, target = pair()
    twice = torch.cat([student, student]), torch.cat([target, target])
    mean, total = partial_l2(student, target, MARGIN, "mean"), partial_l2(student, target, MARGIN, "sum")
    torch.testing.assert_close(partial_l2(*twice, MARGIN, "mean"), mean)
    torch.testing.assert_close(partial_l2(*twice, MARGIN, "sum"), 2 * total)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_costs_0_and_can_be_differentiated(reduction):
    student = torch.zeros(0, 3, 4, 5, requires_grad=True)
    loss = partial_l2(student, torch.zeros(0, 3, 4, 5), MARGIN, reduction)
    assert loss.item() == 0
    loss.backward()
    assert student.grad.shape == student.shape


def test_the_inputs_are_left_alone():
    student, target = pair()
    copies = student.clone(), target.clone(), MARGIN.clone()
    partial_l2(student, target, MARGIN)
    assert all(torch.equal(x, copy) for x, copy in zip((student, target, MARGIN), copies))


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="'average'"):
        partial_l2(*pair(), MARGIN, "average")


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 1, 4, 5), (1, 3, 4, 5), (3, 4, 5)])
def test_shapes_that_differ_are_named(shape):
    student, _ = pair()
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\) and target " + str(shape).replace("(", r"\(")[:-1]):
        partial_l2(student, torch.zeros(shape), MARGIN)
