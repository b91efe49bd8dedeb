"""Plain L2, CWD, PKD and attention transfer, and the two logit losses: against numpy."""

import numpy as np
import pytest
import torch

from mgd_det.distillation import (
    attention_transfer,
    channel_wise_kl,
    pearson_distance,
    plain_l2,
    sigmoid_logit_loss,
    softmax_logit_loss,
)


def random(*shape, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def pair(images=3, channels=5, size=(4, 6), **options):
    return random(images, channels, *size, seed=1, **options), random(images, channels, *size, seed=2, **options)


# ------------------------------------------------------------------ the same in numpy, one channel or box at a time


def l2_by_numpy(student, target):
    return np.mean((student - target) ** 2)


def kl_by_numpy(student, target, temperature=1.0):
    total = []
    for s, t in zip(student.reshape(-1, student[0, 0].size), target.reshape(-1, student[0, 0].size)):
        log_p, log_q = (logits - np.logaddexp.reduce(logits) for logits in (t / temperature, s / temperature))
        total.append(temperature**2 * np.sum(np.exp(log_p) * (log_p - log_q)))
    return np.mean(total)


def pearson_by_numpy(student, target):
    channels = range(student.shape[1])
    return np.mean([1 - np.corrcoef(student[:, c].ravel(), target[:, c].ravel())[0, 1] for c in channels])


def attention_by_numpy(student, teacher, power=2.0):
    distances = []
    for s, t in zip(student, teacher):
        maps = [(np.abs(x) ** power).sum(axis=0).ravel() for x in (s, t)]
        maps = [x / np.sqrt((x**2).sum()) for x in maps]
        distances.append(((maps[0] - maps[1]) ** 2).sum())
    return np.mean(distances)


def softmax_by_numpy(student, teacher, temperature=1.0):
    rows = []
    for s, t in zip(student, teacher):
        p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (t, s))
        rows.append(temperature**2 * np.sum(p * (np.log(p) - np.log(q))))
    return np.mean(rows)


def sigmoid_by_numpy(student, teacher, temperature=1.0, gamma=2.0):
    t, s = (1 / (1 + np.exp(-x / temperature)) for x in (teacher, student))
    entropy = -(t * np.log(s) + (1 - t) * np.log(1 - s))
    detections = max(np.sum(1 / (1 + np.exp(-teacher)) ** 2), 1)
    return temperature**2 * np.sum(np.abs(t - s) ** gamma * entropy) / detections


FEATURE_LOSSES = [
    (plain_l2, l2_by_numpy, {}),
    (channel_wise_kl, kl_by_numpy, {}),
    (channel_wise_kl, kl_by_numpy, {"temperature": 4.0}),
    (channel_wise_kl, kl_by_numpy, {"temperature": 0.5}),
    (pearson_distance, pearson_by_numpy, {}),
    (attention_transfer, attention_by_numpy, {}),
    (attention_transfer, attention_by_numpy, {"power": 1.0}),
    (attention_transfer, attention_by_numpy, {"power": 4.0}),
]


@pytest.mark.parametrize("loss, by_numpy, options", FEATURE_LOSSES)
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_feature_loss(loss, by_numpy, options, scale):
    student, target = pair(scale=scale)
    value = loss(student, target, **options)
    assert value.shape == () and value.dtype == torch.float32
    expected = by_numpy(student.double().numpy(), target.double().numpy(), **options)
    assert expected > 0.01
    assert value.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("loss, by_numpy, options", FEATURE_LOSSES)
def test_gradient_reaches_the_student_alone_and_is_right(loss, by_numpy, options):
    student, target = pair(images=2, channels=2, size=(2, 3), dtype=torch.float64)
    student.requires_grad_(), target.requires_grad_()
    loss(student, target, **options).backward()
    assert target.grad is None
    for index in [(0, 0, 0, 0), (1, 1, 1, 2)]:
        sides = []
        for step in (1e-6, -1e-6):
            moved = student.detach().numpy().copy()
            moved[index] += step
            sides.append(by_numpy(moved, target.detach().numpy(), **options))
        assert student.grad[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("loss, by_numpy, options", FEATURE_LOSSES)
def test_zero_for_equal_maps_and_for_an_empty_batch(loss, by_numpy, options):
    student, _ = pair()
    assert loss(student, student.clone(), **options).item() == pytest.approx(0, abs=1e-6)
    empty = torch.zeros(0, 5, 4, 6, requires_grad=True)
    value = loss(empty, torch.zeros(0, 5, 4, 6), **options)
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize("loss, by_numpy, options", FEATURE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, by_numpy, options, dtype):
    student, target = pair(dtype=dtype, scale=100.0)  # whose squares overflow float16
    value = loss(student, target, **options)
    expected = by_numpy(student.double().numpy(), target.double().numpy(), **options)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss, by_numpy, options", FEATURE_LOSSES)
@pytest.mark.parametrize("value", [0.0, 100.0])
@pytest.mark.parametrize("size", [(4, 6), (1, 1)])
def test_constant_channels_have_finite_losses_and_gradients(loss, by_numpy, options, value, size):
    for constant_student in (True, False):
        constant, varied = torch.full((2, 3, *size), value), random(2, 3, *size)
        student, target = (constant, varied) if constant_student else (varied, constant)
        student.requires_grad_()
        result = loss(student, target, **options)
        result.backward()
        assert torch.isfinite(result) and torch.isfinite(student.grad).all() and student.grad.abs().max() < 1e3


def test_pearson_ignores_scale_and_offset_and_sees_the_sign():
    student, target = pair()
    moved = target * torch.tensor([0.1, 2, 30, 0.5, 7]).view(1, 5, 1, 1) + torch.arange(5.0).view(1, 5, 1, 1)
    assert pearson_distance(student, moved).item() == pytest.approx(pearson_distance(student, target).item(), rel=1e-4)
    assert pearson_distance(-target, moved).item() == pytest.approx(2, rel=1e-5)
    assert pearson_distance(torch.full_like(target, 3.7), target).item() == 1


def test_attention_transfer_takes_other_channels():
    student, teacher = random(2, 3, 4, 5), random(2, 8, 4, 5, seed=9)
    expected = attention_by_numpy(student.double().numpy(), teacher.double().numpy())
    assert attention_transfer(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="differ in size"):
        attention_transfer(student, teacher[..., :4])


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_attention_transfer_of_a_large_power_neither_over_nor_underflows(scale):
    student, teacher = random(2, 3, 4, 5, scale=scale), random(2, 8, 4, 5, seed=9, scale=scale)
    student.requires_grad_()
    value = attention_transfer(student, teacher, power=16.0)
    value.backward()
    expected = attention_by_numpy(student.detach().double().numpy(), teacher.double().numpy(), power=16.0)
    assert value.item() == pytest.approx(expected, rel=1e-3)
    assert torch.isfinite(student.grad).all() and student.grad.abs().max() * scale > 1e-3


@pytest.mark.parametrize("loss", [plain_l2, channel_wise_kl, pearson_distance])
def test_other_shapes_are_refused(loss):
    with pytest.raises(ValueError, match="differ in shape"):
        loss(random(2, 3, 4, 5), random(2, 4, 4, 5))


# ------------------------------------------------------------------ logits

LOGIT_LOSSES = [
    (softmax_logit_loss, softmax_by_numpy, {}),
    (softmax_logit_loss, softmax_by_numpy, {"temperature": 3.0}),
    (sigmoid_logit_loss, sigmoid_by_numpy, {}),
    (sigmoid_logit_loss, sigmoid_by_numpy, {"temperature": 2.0, "gamma": 0.0}),
    (sigmoid_logit_loss, sigmoid_by_numpy, {"gamma": 1.0}),
    (sigmoid_logit_loss, sigmoid_by_numpy, {"gamma": 0.5}),
]


@pytest.mark.parametrize("loss, by_numpy, options", LOGIT_LOSSES)
@pytest.mark.parametrize("shift", [0.0, -5.0])  # -5: hardly a detection
def test_logit_loss(loss, by_numpy, options, shift):
    student, teacher = random(7, 4, scale=2) + shift, random(7, 4, seed=5, scale=2) + shift
    value = loss(student, teacher, **options)
    expected = by_numpy(student.double().numpy(), teacher.double().numpy(), **options)
    assert expected > 0 and value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss, by_numpy, options", LOGIT_LOSSES)
def test_gradient_of_a_logit_loss(loss, by_numpy, options):
    student, teacher = random(3, 4).requires_grad_(), random(3, 4, seed=5).requires_grad_()
    loss(student, teacher, **options).backward()
    assert teacher.grad is None
    moved = [student.detach().double().numpy().copy() for _ in range(2)]
    moved[0][1, 2] += 1e-6
    moved[1][1, 2] -= 1e-6
    sides = [by_numpy(s, teacher.detach().double().numpy(), **options) for s in moved]
    assert student.grad[1, 2].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_equal_logits_have_no_gradient(gamma):
    student = torch.tensor([-4.6, 0.0, 3.0], requires_grad=True)
    sigmoid_logit_loss(student, student.detach().clone(), gamma=gamma).backward()
    assert student.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss, by_numpy, options", LOGIT_LOSSES)
def test_no_boxes_and_large_logits(loss, by_numpy, options):
    assert loss(torch.zeros(0, 4), torch.zeros(0, 4), **options).item() == 0
    student = torch.tensor([[80.0, -80.0], [0.0, 200.0]], requires_grad=True)
    value = loss(student, -student.detach(), **options)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()
