"""Norm layers put into networks that come with batch norms: what they take over, and what freezing makes of them."""

import copy

import pytest
import torch
import torchvision
import toy
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from mgd_det.errors import UserError
from mgd_det.modeling.backbone.norms import freeze_batch_norms, replace_batch_norms


def network():
    """Batch norms of two kinds, in nested modules, with statistics of their own."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, bias=False),
        nn.BatchNorm2d(24, eps=0.1, momentum=0.01),
        nn.Sequential(nn.ReLU(), nn.Conv2d(24, 32, 3, bias=False), nn.BatchNorm2d(32)),
    )
    toy.randomize_norms(net)
    return net.eval()


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "norm, kind", [("FrozenBN", FrozenBatchNorm2d), ("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm)]
)
@torch.no_grad()
def test_another_batch_norm_computes_the_same(norm, kind):
    net = network()
    expected = net(images())
    assert replace_batch_norms(net, norm) is net
    for path, eps, momentum in (("1", 0.1, 0.01), ("2.2", 1e-5, 0.1)):
        layer = net.get_submodule(path)
        assert type(layer) is kind and layer.eps == eps and not layer.training
        assert kind is FrozenBatchNorm2d or layer.momentum == momentum
    torch.testing.assert_close(net(images()), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_group_norm_takes_over_weight_bias_and_eps():
    net, reference = network(), network()
    replace_batch_norms(net, "GN")
    x = torch.randn(2, 24, 5, 5)
    # 24 channels have 8 groups of 3: normalised by hand.
    groups = x.reshape(2, 8, -1)
    groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 0.1).sqrt()
    weight, bias = (t.view(1, -1, 1, 1) for t in (reference[1].weight, reference[1].bias))
    torch.testing.assert_close(net[1](x), groups.reshape(x.shape) * weight + bias)
    assert net[2][2].num_groups == 32


@torch.no_grad()
def test_an_eps_and_a_momentum_that_are_not_the_usual_ones():
    net = torchvision.models.mobilenet_v3_small().features.eval()
    toy.randomize_norms(net)
    expected = net(images())
    replace_batch_norms(net, "FrozenBN")
    assert {m.eps for m in net.modules() if isinstance(m, FrozenBatchNorm2d)} == {0.001}
    torch.testing.assert_close(net(images()), expected, rtol=1e-5, atol=1e-6)


def test_a_function_and_a_layer_without_affine():
    net = replace_batch_norms(network(), nn.InstanceNorm2d)
    assert type(net[1]) is type(net[2][2]) is nn.InstanceNorm2d and net[1].num_features == 24
    assert net(images()).isfinite().all()


@pytest.mark.parametrize("norm", ["BatchNorm", "", None, lambda channels: channels])
def test_no_norm_layer(norm):
    with pytest.raises(UserError, match="MODEL.SOME.NORM is .* FrozenBN, BN, SyncBN, GN"):
        replace_batch_norms(network(), norm, "MODEL.SOME.NORM")


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN", "GN"])
@torch.no_grad()
def test_freezing(norm):
    net = replace_batch_norms(network(), norm)
    expected, keys = net(images()), list(net.state_dict())
    assert freeze_batch_norms(net) is net
    assert {type(net[1]), type(net[2][2])} == {nn.GroupNorm if norm == "GN" else FrozenBatchNorm2d}
    # Statistics stay in training mode too.
    torch.testing.assert_close(net.train()(images()), expected, rtol=1e-6, atol=1e-6)
    assert sorted(net.state_dict()) == sorted(keys)


def test_a_bare_batch_norm_is_replaced():
    norm = nn.BatchNorm2d(8)
    assert type(replace_batch_norms(norm, "FrozenBN")) is FrozenBatchNorm2d
    assert type(freeze_batch_norms(norm)) is FrozenBatchNorm2d


@pytest.mark.parametrize("change", [lambda n: replace_batch_norms(n, "SyncBN"), lambda n: n, freeze_batch_norms])
@torch.no_grad()
def test_what_a_batch_norm_of_timm_runs_after_itself_stays(change):
    layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(layers.BatchNormAct2d(3, act_layer=nn.SiLU, inplace=False)).eval()
    toy.randomize_norms(net)
    x = images()
    expected = nn.functional.silu(
        nn.functional.batch_norm(x, net[0].running_mean, net[0].running_var, net[0].weight, net[0].bias)
    )
    keys = {f"0.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    for changed in (change(net), freeze_batch_norms(change(copy.deepcopy(net)))):
        torch.testing.assert_close(copy.deepcopy(changed)(x), expected)
        assert {key for key in changed.state_dict() if "tracked" not in key} == keys
    assert type(changed[0]) is FrozenBatchNorm2d
