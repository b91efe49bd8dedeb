"""Losses of boxes and masks, and CrossKD's affine of channels: against numpy and torchvision."""

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou

from mgd_det.distillation import bernoulli_logit_loss, sigmoid_logit_loss, weighted_giou_loss
from mgd_det.modeling.head_distillation.cross_heads import match_moments


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def boxes(number, seed):
    corners = torch.rand(number, 2, 2, generator=torch.Generator().manual_seed(seed)) * 20
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 0.5], dim=1)


def giou_by_numpy(a, b):
    inter = np.prod([max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)])
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter
    hull = np.prod([max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)])
    return inter / union - (hull - union) / hull


@pytest.mark.parametrize("normalizer", [None, 7.5])
@pytest.mark.parametrize("highest", [1.0, 0.01])  # 0.01: the weights have a sum below 1
def test_giou_is_weighted_by_the_score(normalizer, highest):
    student, teacher = boxes(12, 1).requires_grad_(), boxes(12, 2)
    scores = torch.rand(12, generator=torch.Generator().manual_seed(3)) * highest
    losses = [1 - giou_by_numpy(s, t) for s, t in zip(student.detach().double().numpy(), teacher.double().numpy())]
    pairs = generalized_box_iou(student.detach(), teacher).diagonal()
    assert pairs.numpy() == pytest.approx(1 - np.array(losses), abs=1e-5)
    weights = scores.double().numpy()
    expected = np.sum(weights * losses) / (normalizer or max(weights.sum(), 1))
    value = weighted_giou_loss(student, teacher, scores, normalizer)
    assert expected > 0.001 and value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert student.grad.abs().sum() > 0


def test_equal_boxes_have_no_loss_even_those_without_area():
    teacher = torch.cat([boxes(5, 1), torch.tensor([[3.0, 3.0, 3.0, 9.0], [4.0, 4.0, 4.0, 4.0]])])
    student = teacher.clone().requires_grad_()
    value = weighted_giou_loss(student, teacher, torch.ones(7))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and torch.isfinite(student.grad).all()
    assert weighted_giou_loss(boxes(7, 4), teacher, torch.ones(7)) > 0.1


def test_boxes_of_the_teacher_get_no_gradient_and_no_boxes_no_loss():
    student, teacher = boxes(3, 1).requires_grad_(), boxes(3, 2).requires_grad_()
    scores = torch.ones(3, requires_grad=True)
    weighted_giou_loss(student, teacher, scores).backward()
    assert teacher.grad is None and scores.grad is None and student.grad is not None
    empty = torch.zeros(0, 4, requires_grad=True)
    value = weighted_giou_loss(empty, torch.zeros(0, 4), torch.zeros(0))
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize("shift", [0.0, -6.0])
def test_masks_by_pixel(shift):
    student, teacher = random(3, 5, 5, scale=2).requires_grad_(), random(3, 5, 5, seed=1, scale=2) + shift
    q, p = (1 / (1 + np.exp(-x.detach().double().numpy())) for x in (student, teacher))
    expected = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    value = bernoulli_logit_loss(student, teacher)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert student.grad.numpy() == pytest.approx((q - p) / p.size, abs=1e-6)  # of the binary cross-entropy


def test_masks_that_are_equal_large_or_missing():
    logits = torch.tensor([[200.0, -200.0], [0.3, -4.0]])
    assert bernoulli_logit_loss(logits, logits).item() == 0
    assert bernoulli_logit_loss(logits, -logits).item() > 99
    assert bernoulli_logit_loss(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4)).item() == 0


def test_another_normalizer_of_the_classes():
    student, teacher = random(40, seed=1), random(40, seed=2)
    soft_number = np.sum(1 / (1 + np.exp(-teacher.double().numpy())) ** 2)
    default, other = (sigmoid_logit_loss(student, teacher, gamma=1.0, normalizer=n).item() for n in (None, 3.0))
    assert soft_number > 1 and other * 3 == pytest.approx(default * soft_number, rel=1e-5)


def test_channels_get_the_teachers_mean_and_deviation():
    student, teacher = random(2, 3, 4, 5, scale=3).requires_grad_(), random(2, 3, 4, 5, seed=1) + 2
    aligned = match_moments(student, teacher)
    for c in range(3):
        s, t = (x[:, c].detach().double().numpy() for x in (student, teacher))
        expected = (s - s.mean()) / s.std() * t.std() + t.mean()
        assert aligned[:, c].detach().numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    same = match_moments(teacher, teacher)
    assert torch.allclose(same, teacher, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 3)])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_constant_channels_have_the_teachers_mean_and_no_gradient(size, noise):
    images, height, width = size
    student = (torch.full((images, 2, height, width), 0.7) + noise * random(images, 2, height, width)).requires_grad_()
    teacher = random(images, 2, height, width)
    aligned = match_moments(student, teacher)
    (aligned * random(images, 2, height, width, seed=1)).sum().backward()
    assert torch.allclose(aligned, teacher.mean((0, 2, 3), keepdim=True).expand_as(aligned), atol=1e-5)
    assert not student.grad.any()
