"""Features before an activation: the activations that taps know, values and gradients beside the plain network's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import erf
from torch import nn

from mgd_det.distillation import FeatureHooks, FeatureSpec
from mgd_det.distillation.feature_hooks import ends_in_activation


def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)).double()


class Ends(nn.Module):
    """One conv, then ``activation``: a module, or a function."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 1)
        self.activation = activation

    def forward(self, x):
        return self.activation(5 * self.conv(x))


def network_with(activation):
    return nn.ModuleDict({"block": Ends(activation)}).double()["block"], FeatureSpec("", True)


def limited(low, high):
    return lambda x: np.clip(x, low, high)


def below_zero(function):
    return lambda x: np.where(x > 0, x, function(x))


RELU = limited(0, None)
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
GELU_TANH = math.sqrt(2 / math.pi)


def hardswish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


ACTIVATIONS = [
    (nn.ReLU(), RELU),
    (nn.ReLU(inplace=True), RELU),
    (nn.ReLU6(), limited(0, 6)),
    (nn.ReLU6(inplace=True), limited(0, 6)),
    (nn.Hardtanh(-2.0, 3.0), limited(-2, 3)),
    (nn.Hardtanh(inplace=True), limited(-1, 1)),
    (F.relu, RELU),
    (F.relu_, RELU),
    (lambda x: F.relu(x, inplace=True), RELU),
    (lambda x: F.relu(input=x), RELU),
    (torch.relu, RELU),
    (torch.relu_, RELU),
    (torch.Tensor.relu, RELU),
    (lambda x: x.relu_(), RELU),
    (F.relu6, limited(0, 6)),
    (lambda x: F.relu6(x, inplace=True), limited(0, 6)),
    (F.hardtanh, limited(-1, 1)),
    (F.hardtanh_, limited(-1, 1)),
    (lambda x: F.hardtanh(x, max_val=2.0, min_val=-3.0), limited(-3, 2)),
    (lambda x: F.hardtanh(x, -3.0, 2.0, True), limited(-3, 2)),
    (lambda x: F.hardtanh_(x, -3.0, 2.0), limited(-3, 2)),
    (nn.Hardswish(), hardswish),
    (nn.Hardswish(inplace=True), hardswish),
    (lambda x: F.hardswish(x, True), hardswish),
    (nn.SiLU(), silu),
    (nn.SiLU(inplace=True), silu),
    (nn.Mish(inplace=True), mish),
    (nn.GELU(), gelu),
    (nn.GELU(approximate="tanh"), lambda x: x * (1 + np.tanh(GELU_TANH * (x + 0.044715 * x**3))) / 2),
    (nn.LeakyReLU(0.2), below_zero(lambda x: 0.2 * x)),
    (nn.LeakyReLU(0.2, inplace=True), below_zero(lambda x: 0.2 * x)),
    (lambda x: F.leaky_relu_(x, 0.2), below_zero(lambda x: 0.2 * x)),
    (nn.PReLU(init=0.3), below_zero(lambda x: 0.3 * x)),
    (nn.ELU(0.5, inplace=True), below_zero(lambda x: 0.5 * np.expm1(x))),
    (lambda x: F.elu_(x, 0.5), below_zero(lambda x: 0.5 * np.expm1(x))),
    (nn.CELU(0.5, inplace=True), below_zero(lambda x: 0.5 * np.expm1(x / 0.5))),
    (lambda x: F.celu_(x, 0.5), below_zero(lambda x: 0.5 * np.expm1(x / 0.5))),
    (nn.SELU(inplace=True), lambda x: SELU_SCALE * below_zero(lambda x: SELU_ALPHA * np.expm1(x))(x)),
    (F.selu_, lambda x: SELU_SCALE * below_zero(lambda x: SELU_ALPHA * np.expm1(x))(x)),
    (nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU6(inplace=True))), limited(0, 6)),
]
NO_ACTIVATIONS = [
    nn.Identity(),
    nn.Sigmoid(),
    nn.Hardsigmoid(inplace=True),
    nn.Softplus(),
    nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)),
    nn.Sequential(nn.SiLU(), nn.MaxPool2d(2)),
    lambda x: x * torch.sigmoid(F.relu(x)),  # a gate, as in squeeze-and-excitation
]


@pytest.mark.parametrize("activation, formula", ACTIVATIONS)
@torch.no_grad()
def test_every_kind_of_activation(activation, formula):
    network, spec = network_with(activation)
    before = 5 * F.conv2d(images(), network.conv.weight, network.conv.bias)
    assert before.min() < -6 and before.max() > 6
    plain = network(images())
    with FeatureHooks(network, {"a": spec}).reading() as features:
        output = network(images())
    torch.testing.assert_close(features["a"], before)
    torch.testing.assert_close(output, torch.from_numpy(formula(before.numpy())))
    assert torch.equal(output, plain)


@pytest.mark.parametrize("activation, formula", ACTIVATIONS)
def test_gradients_are_those_of_the_plain_network(activation, formula):
    network, spec = network_with(activation)
    inputs = [images().requires_grad_() for _ in range(2)]
    (network(inputs[0]) ** 2).sum().backward()
    with FeatureHooks(network, {"a": spec}).reading() as features:
        output = network(inputs[1])
    (output**2).sum().backward(retain_graph=True)
    # ELU and its kin compute it from their output where they run in place: the same but for rounding.
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-12)
    # The feature's own gradient flows beside it.
    before, inputs[1].grad = inputs[1].grad, None
    features["a"].sum().backward()
    weight = network.conv.weight.detach()[:, :, 0, 0]
    torch.testing.assert_close(inputs[1].grad, (5 * weight.sum(0)).view(1, 3, 1, 1).expand_as(before))


@torch.no_grad()
def test_the_last_of_several_activations():
    network, spec = network_with(nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)))
    x = 5 * F.conv2d(images(), network.conv.weight, network.conv.bias)
    before = F.conv2d(torch.from_numpy(silu(x.numpy())), network.activation[1].weight, network.activation[1].bias)
    with FeatureHooks(network, {"a": spec}).reading() as features:
        output = network(images())
    torch.testing.assert_close(features["a"], before)
    assert torch.equal(output, features["a"].clamp(min=0)) and features["a"].min() < 0


@torch.no_grad()
def test_inside_nested_sequentials():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True))),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU6(inplace=True))),
    ).eval()
    network.double()
    specs = {
        "outer": FeatureSpec("0", True),
        "inner": FeatureSpec("0.1", True),
        "relu": FeatureSpec("1.1.1", True),
        "after": FeatureSpec("1", False),
    }
    with FeatureHooks(network, specs).reading() as features:
        output = network(images())
    x = F.conv2d(images(), network[0][0].weight, network[0][0].bias)
    x = x / (1 + network[0][1][0].eps) ** 0.5
    torch.testing.assert_close(features["outer"], x)
    assert torch.equal(features["outer"], features["inner"])
    assert torch.equal(features["relu"].clamp(0, 6), output)
    assert features["relu"].min() < 0
    assert torch.equal(features["after"], output)


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.SiLU(inplace=True)])
def test_activations_outside_the_module_stay_in_place(activation):
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 1), activation).double()
    seen = []
    network[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with FeatureHooks(network, {"a": FeatureSpec("0", True)}).reading():
        output = network(images())
    assert output.data_ptr() == seen[0].data_ptr()


@pytest.mark.parametrize("end", NO_ACTIVATIONS)
def test_a_module_that_does_not_end_in_an_activation(end):
    network = nn.Sequential(Ends(end)).double()
    with pytest.raises(RuntimeError, match="feature 'a': module '0' does not end in an activation"):
        with FeatureHooks(network, {"a": FeatureSpec("0", True)}).reading():
            network(images())
    assert torch.overrides._get_current_function_mode_stack() == []


def test_ends_in_activation():
    for activation, _ in ACTIVATIONS:
        network, _ = network_with(activation)
        assert ends_in_activation(network, images()), activation
    for end in NO_ACTIVATIONS:
        assert not ends_in_activation(network_with(end)[0], images()), end
    assert torch.overrides._get_current_function_mode_stack() == []
    with pytest.raises(RuntimeError):
        ends_in_activation(nn.Conv2d(1, 1, 1), images())
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize(
    "name", ["relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "silu", "mish", "gelu", "hard_swish"]
)
def test_activations_of_timm(name):
    layers = pytest.importorskip("timm.layers")
    network, _ = network_with(layers.create_act_layer(name, inplace=True))
    assert ends_in_activation(network, images())
