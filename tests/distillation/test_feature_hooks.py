"""Taps on Detectron2's ResNets: what they read, that they change nothing, and what goes wrong."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import nn

from mgd_det.distillation import FeatureHooks, FeatureSpec, distillation_features


def resnet(block, norm="BN"):
    """Three narrow stages of Detectron2's blocks; the norm layers describe some data already."""
    torch.manual_seed(0)
    basic = block is BasicBlock
    extra = {} if basic else {"bottleneck_channels": 4}
    stages, channels = [], 8
    for width, stride in ((8, 1), (12, 2), (16, 2)):
        stages.append(
            ResNet.make_stage(
                block,
                2,
                stride_per_block=[stride, 1],
                in_channels=channels,
                out_channels=width,
                norm=norm,
                **extra,
            )
        )
        channels = width
    network = ResNet(BasicStem(3, 8, norm=norm), stages, out_features=["res2", "res3", "res4"])
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def tapped(network, *names, **options):
    specs = distillation_features(network)
    return FeatureHooks(network, {name: specs[name] for name in names or specs}, **options)


def conv_norm(conv, x):
    """A conv of Detectron2 with its norm layer, from its tensors alone."""
    x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    n = conv.norm
    mean, var, weight, bias = (v.view(1, -1, 1, 1) for v in (n.running_mean, n.running_var, n.weight, n.bias))
    return (x - mean) / (var + n.eps).sqrt() * weight + bias


def before_last_relu(block, x):
    convs = [block.conv1, block.conv2] + ([block.conv3] if hasattr(block, "conv3") else [])
    out = x
    for conv in convs[:-1]:
        out = conv_norm(conv, out).clamp(min=0)
    out = conv_norm(convs[-1], out)
    return out + (x if block.shortcut is None else conv_norm(block.shortcut, x))


blocks = pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock])


# ------------------------------------------------------------------ what is read


@pytest.mark.slow
@blocks
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@torch.no_grad()
def test_reads_every_stage_before_its_last_relu(block, norm):
    network = resnet(block, norm).eval()
    expected, x = {}, network.stem(images())
    for name in ("res2", "res3", "res4"):
        stage = getattr(network, name)
        for inner in stage[:-1]:
            x = before_last_relu(inner, x).clamp(min=0)
        expected[name] = before_last_relu(stage[-1], x)
        x = expected[name].clamp(min=0)

    with tapped(network).reading() as features:
        outputs = network(images())
    assert list(features) == ["res2", "res3", "res4"]
    for name, feature in features.items():
        assert feature.min() < -0.1
        torch.testing.assert_close(feature, expected[name], atol=1e-4, rtol=1e-4)
        assert torch.equal(feature.clamp(min=0), outputs[name])


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_full_resnets_of_detectron2(depth):
    stages = ResNet.make_default_stages(depth, norm="FrozenBN")
    network = ResNet(BasicStem(norm="FrozenBN"), stages, out_features=["res2", "res3", "res4", "res5"]).eval()
    plain = network(images())
    with tapped(network).reading() as features:
        outputs = network(images())
    assert list(features) == list(outputs) == list(plain)
    for name, feature in features.items():
        assert torch.equal(outputs[name], plain[name])
        assert torch.equal(feature.clamp(min=0), outputs[name]) and feature.min() < 0


@torch.no_grad()
def test_after_the_activation_it_is_the_modules_output():
    network = resnet(BasicBlock).eval()
    with FeatureHooks(network, {"a": FeatureSpec("res2.1", False)}).reading() as features:
        outputs = network(images())
    assert torch.equal(features["a"], outputs["res2"])


@torch.no_grad()
def test_two_features_of_one_module():
    network = resnet(BasicBlock).eval()
    specs = {"before": FeatureSpec("res2.1", True), "after": FeatureSpec("res2.1", False)}
    specs["again"] = specs["before"]
    with FeatureHooks(network, specs).reading() as features:
        outputs = network(images())
    assert torch.equal(features["after"], outputs["res2"])
    assert features["before"].min() < 0 and torch.equal(features["again"], features["before"])


# ------------------------------------------------------------------ the network is not changed


def trained(network, taps=None):
    """Outputs and gradients of one training step."""
    network.train()
    x = images().requires_grad_()
    if taps is None:
        outputs = network(x)
    else:
        with taps.reading():
            outputs = network(x)
    generator = torch.Generator().manual_seed(2)
    sum((torch.randn(y.shape, generator=generator) * y).sum() for y in outputs.values()).backward()
    buffers = [b.clone() for b in network.buffers()]
    return [*outputs.values(), x.grad, *(p.grad for p in network.parameters()), *buffers]


@pytest.mark.slow
@blocks
def test_outputs_gradients_and_statistics_are_bitwise_the_same(block):
    network = resnet(block)
    copy = deepcopy(network)
    plain, read = trained(network), trained(copy, tapped(copy))
    assert len(plain) > 30
    assert all(torch.equal(one, other) for one, other in zip(plain, read))


def test_gradient_flows_through_a_feature():
    network = resnet(BasicBlock)
    with tapped(network, "res3").reading() as features:
        network(images())
    features["res3"].clamp(max=0).sum().backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    for name in ("stem.conv1.weight", "res2.0.conv1.weight", "res3.1.conv2.norm.weight", "res3.1.conv2.norm.bias"):
        assert grads[name] is not None and grads[name].abs().sum() > 0
    assert all(grads[name] is None for name in grads if name.startswith("res4"))


def test_gradient_of_a_feature_adds_to_that_of_the_output():
    network = resnet(BasicBlock)
    bias = network.res4[-1].conv2.norm.bias
    with tapped(network, "res4").reading() as features:
        outputs = network(images())
    feature, output = features["res4"], outputs["res4"]
    (2 * feature.sum() + 3 * output.sum()).backward()
    # d feature / d bias = 1 at each of its places, d output / d bias = 1 where it is above zero
    expected = 2 * feature[:, 0].numel() + 3 * (feature > 0).sum(dim=(0, 2, 3))
    torch.testing.assert_close(bias.grad, expected.float())


def test_nothing_happens_outside_reading(monkeypatch):
    network = resnet(BasicBlock).eval()
    taps = tapped(network, stop_after_last=True)
    in_place = []
    relu_ = F.relu_

    def spy(x):
        y = relu_(x)
        in_place.append(y is x)
        return y

    monkeypatch.setattr(F, "relu_", spy)
    with taps.reading():
        network(images())
    assert not all(in_place)
    in_place.clear()
    outputs = network(images())
    assert list(outputs) == ["res2", "res3", "res4"] and in_place == [True] * 13
    assert not taps.active
    assert torch.overrides._get_current_function_mode_stack() == []


def test_reading_twice_gives_two_dicts():
    network = resnet(BasicBlock).eval()
    taps = tapped(network, "res2")
    with taps.reading() as first:
        network(images())
    kept = first["res2"].clone()
    with taps.reading() as second:
        network(2 * images())
    assert torch.equal(first["res2"], kept) and not torch.equal(second["res2"], kept)


# ------------------------------------------------------------------ ending a forward early


def count_calls(network):
    calls = {}

    def count(name):
        def hook(module, args):
            calls[name] = calls.get(name, 0) + 1

        return hook

    for name, module in network.named_modules():
        module.register_forward_pre_hook(count(name))
    return calls


@torch.no_grad()
def test_stop_after_last_runs_nothing_later():
    network = resnet(BottleneckBlock).eval()
    with tapped(network).reading() as whole:
        network(images())
    taps = tapped(network, "res2", "res3", stop_after_last=True)
    calls = count_calls(network)
    with taps.reading() as features:
        network(images())
        raise AssertionError("the forward went on")
    assert list(features) == ["res2", "res3"]
    assert torch.equal(features["res3"], whole["res3"])
    assert calls["res3.1.conv3"] == 1
    assert not [name for name in calls if name.startswith("res4")]


@torch.no_grad()
def test_stop_after_last_waits_for_all_in_any_order():
    network = resnet(BasicBlock).eval()
    calls = count_calls(network)
    with tapped(network, "res3", "res2", stop_after_last=True).reading() as features:
        network(images())
    assert set(features) == {"res2", "res3"} and "res4.0" not in calls


@torch.no_grad()
def test_without_it_the_forward_runs_on():
    network = resnet(BasicBlock).eval()
    calls = count_calls(network)
    with tapped(network, "res2").reading():
        outputs = network(images())
    assert calls["res4.1"] == 1 and "res4" in outputs


@torch.no_grad()
def test_stopping_inside_a_tapped_module_leaves_no_mode():
    network = nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 1)))
    specs = {"inner": FeatureSpec("0.0", True)}
    outer = FeatureHooks(network, {"outer": FeatureSpec("0", True)})
    inner = FeatureHooks(network, specs, stop_after_last=True)
    with pytest.raises(RuntimeError, match="did not run the module of feature 'outer'"):
        with outer.reading(), inner.reading():
            network(images())
    assert torch.overrides._get_current_function_mode_stack() == []


# ------------------------------------------------------------------ what goes wrong


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error, self.fails = error, True

    def forward(self, x):
        if self.fails:
            raise self.error("out of luck")
        return F.relu_(x + 0)


@pytest.fixture
def no_mode_stays():
    """Ends the modes that a failing test left on, so that the next one starts without."""
    yield
    while torch.overrides._get_current_function_mode_stack():
        torch.overrides._pop_mode()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_module_that_raises_leaves_nothing_behind(error, no_mode_stays):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), Fails(error))
    taps = FeatureHooks(network, {"a": FeatureSpec("1", True)})
    with pytest.raises(error, match="out of luck"):
        with taps.reading():
            network(images())
    assert torch.overrides._get_current_function_mode_stack() == [] and not taps.active
    network[1].fails = False
    network(images())  # outside: reads nothing
    with taps.reading() as features:
        output = network(images())
    assert torch.equal(features["a"].clamp(min=0), output)


def test_an_error_in_the_block_leaves_nothing_behind():
    network = resnet(BasicBlock)
    taps = tapped(network)
    with pytest.raises(RuntimeError, match="stop here"):
        with taps.reading():
            network(images())
            raise RuntimeError("stop here")
    assert not taps.active
    with taps.reading() as features:
        network(images())
    assert len(features) == 3


@pytest.mark.parametrize("path", ["res9.0", "res2.7", "res2.1.conv9"])
def test_a_module_that_is_not_there(path):
    with pytest.raises(AttributeError, match=path.rsplit(".", 1)[-1] if path != "res9.0" else "res9"):
        FeatureHooks(resnet(BasicBlock), {"a": FeatureSpec(path, True)})


def test_a_module_that_the_forward_does_not_run():
    network = resnet(BasicBlock)
    network.unused = nn.ReLU()
    with pytest.raises(RuntimeError, match="did not run the module of feature 'b'"):
        with FeatureHooks(network, {"a": FeatureSpec("res2.1", True), "b": FeatureSpec("unused", True)}).reading():
            network(images())


@pytest.mark.parametrize("before_activation", [False, True])
def test_a_feature_that_is_overwritten_in_place_is_noticed(before_activation):
    """After a ReLU the next in-place ReLU; before it, a module that keeps the input and writes it."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.relu = nn.ReLU() if before_activation else nn.Identity()

        def forward(self, x):
            x = self.conv(x)
            y = self.relu(x)
            return x.mul_(2) if before_activation else F.relu_(y)

    network = Network()
    with torch.no_grad(), pytest.raises(RuntimeError, match="feature 'a' was overwritten in place"):
        with FeatureHooks(network, {"a": FeatureSpec("relu", before_activation)}).reading():
            network(images())


# ------------------------------------------------------------------ copies


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = resnet(BasicBlock).eval()
        self.taps = tapped(self.network, "res3")

    def forward(self, x):
        with self.taps.reading() as features:
            self.network(x)
        return features["res3"]


@torch.no_grad()
def test_a_deep_copy_reads_its_own_network():
    holder = Holder()
    copy = deepcopy(holder)
    copy.network.res3[-1].conv2.norm.bias += 1
    torch.testing.assert_close(copy(images()), holder(images()) + 1, atol=1e-4, rtol=1e-4)
    assert copy.taps is not holder.taps
    with holder.taps.reading() as features:
        copy.network(images())  # a forward of the copy is none of the original's
        assert features == {}
        holder.network(images())
    assert list(features) == ["res3"]


@torch.no_grad()
def test_a_deep_copy_of_the_network_alone_still_runs():
    network = resnet(BasicBlock).eval()
    taps = tapped(network, "res3", stop_after_last=True)
    copy = deepcopy(network)
    with taps.reading() as features:
        copy(images())
        assert features == {}
        network(images())
    assert "res4" in copy(images())


def test_hooks_add_nothing_to_the_state_dict():
    network = resnet(BasicBlock)
    keys = list(network.state_dict())
    tapped(network)
    assert list(network.state_dict()) == keys
