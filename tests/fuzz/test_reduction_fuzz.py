"""Reducers and losses of any shape, type and memory layout, against their definitions in float64.

Gradients are checked against closed forms, worked out by hand from the definitions.
"""

import numpy as np
import oracles
import pytest
import torch
import toy_distiller
from fuzz.budget import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mgd_det.distillation import absolute_max_pooling, partial_l2, random_drop, sparse_matching
from mgd_det.distillation.fused import amp_partial_l2
from mgd_det.distillation.position_losses import PositionFeatures, build_position_loss
from mgd_det.distillation.positions import Position

# Types, and what rounding the result to them may cost.
PRECISION = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYOUTS = ["contiguous", "channels_last", "every second", "crop", "expanded images", "expanded pixels"]


@st.composite
def feature(draw, shape, dtype, rng):
    """(B, C, H, W) of ``dtype`` in one of LAYOUTS, some values zero or equal."""
    images, channels, height, width = shape
    values = rng.normal(size=shape) * draw(st.sampled_from([1.0, 1.0, 1e-2, 30.0]))
    values = np.where(rng.random(shape) < draw(st.sampled_from([0, 0.2, 1])), np.round(values), values)
    layout = draw(st.sampled_from(LAYOUTS))
    if layout == "expanded images":
        values[:] = values[:1]
    elif layout == "expanded pixels":
        values[:] = values[..., :1, :1]
    x = torch.from_numpy(values).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "every second":
        wide = torch.full((images, 2 * channels, height, 2 * width), float("nan"), dtype=dtype)
        wide[:, ::2, :, 1::2] = x
        return wide[:, ::2, :, 1::2]
    if layout == "crop":
        wide = torch.full((images, channels, height + 2, width + 3), float("nan"), dtype=dtype)
        wide[:, :, 1:-1, 2:-1] = x
        return wide[:, :, 1:-1, 2:-1]
    if layout == "expanded images" and images > 0:
        return x[:1].expand(shape)
    return x[..., :1, :1].expand(shape) if layout == "expanded pixels" else x


@st.composite
def problems(draw, dtypes=tuple(PRECISION), unmatched=False, largest=6):
    """student, teacher, margin, groups and a generator of what else is random."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    students, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    teachers = students * size + draw(st.integers(0, 3))
    shape = [draw(st.integers(0, 2)), 0, draw(st.integers(1, largest)), draw(st.integers(1, largest))]
    dtype = draw(st.sampled_from(dtypes))
    student = draw(feature((shape[0], students, *shape[2:]), dtype, rng))
    teacher = draw(feature((shape[0], teachers, *shape[2:]), dtype, rng))
    margin = torch.from_numpy(-np.abs(rng.normal(size=teachers))).float()
    groups = torch.from_numpy(rng.permutation(teachers)[: students * size].reshape(students, size))
    if unmatched and size == 1:
        # Not all: a teacher channel always finds its student channel.
        groups[1:][torch.from_numpy(rng.random(students - 1) < 0.4)] = -1
    return student, teacher, margin, groups, rng


def double(x):
    return x.detach().double().numpy()


# ------------------------------------------------------------------ the definitions, in numpy
def l2_and_gradient(student, target):
    number = max(student.size, 1)
    return ((student - target) ** 2).sum() / number, 2 * (student - target) / number


def softmax(x):
    e = np.exp(x - x.max(axis=(2, 3), keepdims=True))
    return e / e.sum(axis=(2, 3), keepdims=True)


# Of these the third result is the size of the terms that the gradient is a difference of: float32 rounds by it.
def cwd_and_gradient(student, target, temperature):
    s, t = softmax(student / temperature), softmax(target / temperature)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(t > 0, t * (np.log(t) - np.log(s)), 0)
    maps = max(student.shape[0] * student.shape[1], 1)
    return temperature**2 * terms.sum() / maps, temperature * (s - t) / maps, temperature / maps


def pkd_and_gradient(student, target):
    gradient, correlations, size = np.zeros_like(student), [], 0.0
    for c in range(student.shape[1]):
        s, t = student[:, c] - student[:, c].mean(), target[:, c] - target[:, c].mean()
        lengths = np.linalg.norm(s), np.linalg.norm(t)
        if np.ptp(student[:, c]) == 0 or np.ptp(target[:, c]) == 0:
            correlations.append(0.0)  # a constant has none
            continue
        s, t = s / lengths[0], t / lengths[1]
        correlations.append((s * t).sum())
        gradient[:, c] = -(t - correlations[-1] * s) / lengths[0] / student.shape[1]
        size = max(size, 1 / lengths[0] / student.shape[1])
    return 1 - np.mean(correlations), gradient, size


def attention_and_gradient(student, teacher, power):
    maps = [(np.abs(x) ** power).sum(axis=1) for x in (student, teacher)]
    loss, gradient, size = 0.0, np.zeros_like(student), 0.0
    for i in range(len(student)):
        lengths = [np.linalg.norm(m[i]) for m in maps]
        s, t = (m[i] / length if length else m[i] for m, length in zip(maps, lengths))
        loss += ((s - t) ** 2).sum() / len(student)
        if lengths[0]:
            by_value = power * np.abs(student[i]) ** (power - 1) * np.sign(student[i]) / lengths[0]
            gradient[i] = 2 / len(student) * ((s - t) - s * (s * (s - t)).sum()) * by_value
            size = max(size, np.abs(by_value).max())
    return loss, gradient, size


def check(value, student, expected, gradient, precision, size=0.0, loss_size=1e-2):
    """A loss and its gradient, of factor 3, against theirs.

    Args:
        size, loss_size: of the terms that the gradient and the loss are differences of.
    """
    (3 * value).backward()
    np.testing.assert_allclose(value.item(), expected, rtol=precision, atol=precision * loss_size)
    assert student.grad.dtype == student.dtype and student.grad.shape == student.shape
    limits, gradient = torch.finfo(student.dtype), 3 * gradient
    tolerance = precision * max(3 * size, np.abs(gradient).max(initial=0)) + limits.tiny * limits.eps
    gradient = np.where(np.abs(gradient) > limits.max, np.copysign(np.inf, gradient), gradient)
    np.testing.assert_allclose(double(student.grad), gradient, rtol=precision, atol=tolerance)


# ------------------------------------------------------------------ reducers
@pytest.mark.slow
@examples(ci=40, nightly=800)
@given(problem=problems())
def test_absolute_max_pooling(problem):
    _, teacher, margin, groups, _ = problem
    target, reduced_margin = absolute_max_pooling(teacher, margin, groups)
    expected, expected_margin = oracles.absolute_max_pooling(double(teacher), double(margin), groups.numpy())
    assert target.dtype == teacher.dtype
    np.testing.assert_array_equal(double(target), expected)
    np.testing.assert_allclose(double(reduced_margin), expected_margin, rtol=1e-6)


@examples(ci=30, nightly=500)
@given(problem=problems(), seed=st.integers(0, 2**32))
def test_random_drop(problem, seed):
    _, teacher, margin, groups, _ = problem
    target, reduced_margin = random_drop(teacher, margin, groups, generator=torch.Generator().manual_seed(seed))
    members = double(teacher)[:, groups.numpy()]  # (B, Cs, K, H, W)
    assert target.dtype == teacher.dtype and target.shape == (*members.shape[:2], *members.shape[3:])
    assert (double(target)[:, :, None] == members).any(axis=2).all()
    assert (reduced_margin[:, None] == margin[groups]).any(dim=1).all()
    again = random_drop(teacher, margin, groups, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(target, again[0]) and torch.equal(reduced_margin, again[1])


@examples(ci=20, nightly=300)
@given(problem=problems())
def test_sparse_matching(problem):
    _, teacher, margin, groups, _ = problem
    if groups.shape[1] > 1:
        with pytest.raises(ValueError, match="groups of one teacher channel"):
            sparse_matching(teacher, margin, groups)
        groups = groups[:, :1]
    target, reduced_margin = sparse_matching(teacher, margin, groups)
    assert torch.equal(target, teacher[:, groups[:, 0]]) and torch.equal(reduced_margin, margin[groups[:, 0]])


# ------------------------------------------------------------------ MGD's loss
@examples(ci=40, nightly=800)
@given(problem=problems(), reduction=st.sampled_from(["none", "mean", "sum"]))
def test_partial_l2(problem, reduction):
    student, teacher, margin, groups, _ = problem
    target, reduced_margin = absolute_max_pooling(teacher, margin, groups)
    student = student.detach().requires_grad_()
    value = partial_l2(student, target, reduced_margin, reduction)
    assert value.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    # The margin is rounded to the type that the loss is computed in.
    losses, gradient = oracles.partial_l2(double(student), double(target), double(reduced_margin))
    precision = PRECISION[student.dtype]
    if reduction == "none":
        np.testing.assert_allclose(double(value), losses, rtol=max(precision, 1e-5), atol=1e-6)
        return
    divisor = max(losses.size, 1) if reduction == "mean" else 1
    check(value, student, losses.sum() / divisor, gradient / divisor, max(precision, 1e-6))


@examples(ci=25, nightly=500)
@given(problem=problems(largest=4))
def test_the_fused_loss(problem):
    student, teacher, margin, groups, _ = problem
    target, reduced_margin = oracles.absolute_max_pooling(double(teacher), double(margin), groups.numpy())
    losses, gradient = oracles.partial_l2(double(student), target, reduced_margin)
    student = student.detach().requires_grad_()
    value = amp_partial_l2(student, teacher, margin, groups)
    check(value, student, losses.sum(), gradient, max(PRECISION[student.dtype], 1e-6))


# ------------------------------------------------------------------ the losses of positions
def options(draw, name):
    return {
        "partial_l2": lambda: {"scale": draw(st.sampled_from(["mean", "target", "authors"]))},
        "l2": lambda: {"scale": draw(st.sampled_from(["mean", "target"]))},
        "cwd": lambda: {"temperature": draw(st.sampled_from([0.5, 1.0, 4.0]))},
        "pkd": dict,
        "at": lambda: {"power": draw(st.sampled_from([1.0, 2.0, 3.5]))},
        "ab": lambda: {"margin": draw(st.sampled_from([0.5, 1.0, 20.0]))},
    }[name]()


@pytest.mark.parametrize("name", toy_distiller.LOSSES)
@examples(ci=25, nightly=500)
@given(data=st.data())
def test_losses_of_positions(name, data):
    problem = data.draw(problems(unmatched=True))
    student, teacher, margin, groups, rng = problem
    reducer = data.draw(st.sampled_from(["amp", "sm"])) if groups.shape[1] == 1 else "amp"
    chosen = options(data.draw, name)
    student = student.detach().requires_grad_()
    matched = groups[:, 0] >= 0
    mean_square = torch.tensor(rng.uniform(0.1, 3), dtype=torch.float32)
    features = PositionFeatures(
        student,
        teacher,
        teacher_margin=margin,
        groups=groups,
        mean_square=mean_square,
        norm=nn.Identity(),
        reducer=reducer,
        rows=None if matched.all() else matched.nonzero().squeeze(1),
    )
    position = Position("res4", "res4", student.shape[1], teacher.shape[1])
    value = build_position_loss(name, chosen)(position, features)
    assert value.dim() == 0 and value.dtype in (torch.float32, torch.float64)

    rows = matched.numpy()
    s, whole = double(student)[:, rows], np.zeros(student.shape)
    target, reduced_margin = oracles.absolute_max_pooling(double(teacher), double(margin), groups[matched].numpy())
    size, loss_size = 0.0, 1e-2
    if name == "at":
        expected, whole, size = attention_and_gradient(double(student), double(teacher), chosen["power"])
    elif s.size == 0:
        expected = 0.0
    elif name == "partial_l2":
        rms = np.sqrt(mean_square.item()) if chosen["scale"] == "target" else 1
        losses, gradient = oracles.partial_l2(s, target / rms, reduced_margin / rms)
        # res4's factor of the authors' code, and their 8 GPUs.
        divisor = student.shape[0] * 5e6 * 8 if chosen["scale"] == "authors" else s.size
        expected, whole[:, rows] = losses.sum() / divisor, gradient / divisor
    elif name == "l2":
        square = (target**2).mean() if chosen["scale"] == "target" else 1
        expected, whole[:, rows] = l2_and_gradient(s, target / np.sqrt(square or 1))
    elif name == "cwd":
        expected, whole[:, rows], size = cwd_and_gradient(s, target, chosen["temperature"])
        loss_size = chosen["temperature"] ** 2
    elif name == "ab":
        side = np.where(target > 0, 1, -1)
        hinge = np.maximum(chosen["margin"] - side * s, 0)
        expected, whole[:, rows], size = (hinge**2).mean(), -2 * side * hinge / s.size, 2 * chosen["margin"] / s.size
    else:
        expected, whole[:, rows], size = pkd_and_gradient(s, target)
    # Margins and mean squares are of float32.
    precision = {torch.float64: 1e-6, torch.float32: 2e-5}.get(student.dtype, 2e-2)
    check(value, student, expected, whole, precision, size, loss_size)
