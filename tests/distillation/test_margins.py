"""Margins, against the truncated normal distribution of scipy and against numpy."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from mgd_det.distillation import MeasuredMargin, negative_margin


def margin_of(weight, bias, dtype=torch.float64):
    return negative_margin(torch.tensor([weight], dtype=dtype), torch.tensor([bias], dtype=dtype)).item()


@pytest.mark.parametrize("weight", [0.01, 0.3, 1.0, 7.5])
@pytest.mark.parametrize("z", [-6.0, -1.5, -0.2, 0.0, 0.4, 1.0, 2.0, 3.0])
def test_is_the_mean_of_the_negative_part_of_a_normal(weight, z):
    bias = z * weight
    density = stats.norm(bias, weight).pdf
    low = min(bias, 0) - 12 * weight
    mass = integrate.quad(density, low, 0, points=[min(bias, 0)], epsabs=0, limit=200)[0]
    mean = integrate.quad(lambda x: x * density(x), low, 0, points=[min(bias, 0)], epsabs=0, limit=200)[0] / mass
    assert margin_of(weight, bias) == pytest.approx(mean, rel=1e-6)
    assert margin_of(weight, bias) == pytest.approx(stats.truncnorm.mean(-np.inf, -z, bias, weight), rel=1e-6)


def test_of_a_standard_normal():
    assert margin_of(1.0, 0.0) == pytest.approx(-math.sqrt(2 / math.pi), rel=1e-12)


def test_many_channels_at_once_in_float32():
    generator = np.random.default_rng(0)
    weight = generator.normal(0, 1, 200)
    bias = generator.normal(-0.3, 0.5, 200)
    scale = np.abs(weight)
    rare = stats.norm.cdf(-bias / scale) <= 0.001
    expected = np.where(rare, -3 * scale, stats.truncnorm.mean(-np.inf, -bias / scale, bias, scale))
    assert 0 < rare.sum() < 200
    found = negative_margin(torch.tensor(weight).float(), torch.tensor(bias).float())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.5, -0.5])
@pytest.mark.parametrize("z", [3.2, 5.0, 40.0, 1e6])
def test_of_a_channel_that_is_almost_never_negative(weight, z):
    assert margin_of(weight, z * abs(weight)) == pytest.approx(-1.5)


def test_the_rare_branch_starts_at_a_thousandth():
    z = stats.norm.isf(0.001)
    assert margin_of(1.0, z + 1e-6) == pytest.approx(-3)
    assert margin_of(1.0, z - 1e-6) == pytest.approx(stats.truncnorm.mean(-np.inf, -z, z, 1), rel=1e-3)


def test_a_zero_weight_is_a_constant():
    margin = negative_margin(torch.zeros(3), torch.tensor([-0.7, 0.0, 0.7]))
    assert margin.tolist() == pytest.approx([-0.7, 0.0, 0.0])


def test_a_zero_weight_is_the_limit_of_a_small_one():
    assert margin_of(1e-9, -0.7) == pytest.approx(margin_of(0.0, -0.7), abs=1e-7)
    assert margin_of(1e-9, 0.7) == pytest.approx(margin_of(0.0, 0.7), abs=1e-7)


def test_the_sign_of_the_weight_does_not_matter():
    weight, bias = torch.linspace(0.01, 2, 40), torch.linspace(-2, 2, 40)
    assert torch.equal(negative_margin(-weight, bias), negative_margin(weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_and_not_positive_whatever_the_norm_layer_says(dtype):
    sizes = torch.tensor([0.0, 1e-42, 1e-30, 1e-12, 1e-3, 1.0, 50.0, 1e12, 1e30], dtype=dtype)
    values = torch.cat([sizes, -sizes])
    weight, bias = torch.cartesian_prod(values, values).unbind(1)
    margin = negative_margin(weight, bias)
    assert margin.dtype == dtype and margin.shape == weight.shape
    assert torch.isfinite(margin).all()
    assert (margin <= 0).all()


def test_is_below_a_negative_bias():
    weight, bias = torch.full((50,), 0.5, dtype=torch.float64), torch.linspace(-3, 0, 50, dtype=torch.float64)
    assert (negative_margin(weight, bias) < bias).all()


def test_grows_with_the_bias_while_negative_values_are_not_rare():
    bias = torch.linspace(-8, 3.05, 300, dtype=torch.float64)
    assert (negative_margin(torch.ones_like(bias), bias).diff() > 0).all()


@pytest.mark.parametrize("bias", [-1.0, 0.0, 1.0])
def test_falls_with_the_weight(bias):
    weight = torch.linspace(0.4, 9, 200, dtype=torch.float64)
    assert (negative_margin(weight, torch.full_like(weight, bias)).diff() < 0).all()


def test_scales_with_the_unit_of_the_feature():
    weight, bias = torch.rand(50, dtype=torch.float64) + 0.01, torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(negative_margin(8 * weight, 8 * bias), 8 * negative_margin(weight, bias))


def test_needs_no_gradient():
    weight, bias = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    assert not negative_margin(weight, bias).requires_grad


# ------------------------------------------------------------------ measured


def feature(seed, images, size=(3, 4)):
    """Three channels: of both signs, never negative, and always negative."""
    x = np.random.default_rng(seed).normal(0, 1, (images, 3, *size))
    x[:, 1] = np.abs(x[:, 1])
    x[:, 2] = -np.abs(x[:, 2]) - 1
    return torch.from_numpy(x).float()


def mean_of_negatives(features):
    means = []
    for channel in range(3):
        values = np.concatenate([x.double().numpy()[:, channel].ravel() for x in features])
        negative = values[values < 0]
        means.append(negative.mean() if len(negative) else 0.0)
    return means


def measure(features):
    margin = MeasuredMargin(3)
    for x in features:
        margin.update(x)
    return margin.mean()


def test_measured_is_the_mean_of_the_negative_values_of_all_batches():
    features = [feature(0, 4), feature(1, 1), feature(2, 2, (6, 2))]
    mean = measure(features)
    assert mean.dtype == torch.float32 and mean.device.type == "cpu"
    assert mean.tolist() == pytest.approx(mean_of_negatives(features), rel=1e-6)
    assert mean[1] == 0


def test_measured_agrees_with_the_norm_layer_on_what_it_describes():
    weight, bias = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0.2, -1.0, 0.0])
    noise = torch.randn(8, 3, 100, 100, generator=torch.Generator().manual_seed(0))
    x = noise * weight.view(1, 3, 1, 1) + bias.view(1, 3, 1, 1)
    torch.testing.assert_close(measure([x]), negative_margin(weight, bias), rtol=0.02, atol=0)


def test_measured_of_nothing_is_0():
    assert MeasuredMargin(2).mean().tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_measured_sums_halves_without_overflow(dtype):
    x = feature(0, 4, (60, 60)).to(dtype) * 64
    assert x[:, 2].float().sum().abs() > 65504
    assert measure([x]).tolist() == pytest.approx(mean_of_negatives([x.float()]), rel=1e-5)


def test_measured_does_not_drift():
    x = feature(0, 2)
    assert measure([x] * 2000).tolist() == pytest.approx(measure([x]).tolist(), rel=1e-6)
