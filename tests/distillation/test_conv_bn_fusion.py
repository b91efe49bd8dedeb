"""Batch norms folded into convolutions."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from torch import nn
from toy import randomize_norms

from mgd_det.distillation import FeatureHooks, distillation_features
from mgd_det.distillation.conv_bn_fusion import fuse_conv_bn
from mgd_det.modeling.backbone import MobileNetV2, ShuffleNetV2


def trained(network):
    """Its norm layers look trained, and it is in eval mode."""
    randomize_norms(network)
    return network.eval()


def resnet(norm="FrozenBN"):
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(
            BottleneckBlock,
            2,
            stride_per_block=[stride, 1],
            in_channels=i,
            out_channels=o,
            bottleneck_channels=32,
            norm=norm,
        )
        for i, o, stride in ((32, 64, 1), (64, 96, 2))
    ]
    return trained(ResNet(BasicStem(3, 32, norm=norm), stages, out_features=["res2", "res3"]))


@torch.no_grad()
def read(network):
    taps = FeatureHooks(network, distillation_features(network))
    with taps.reading() as features:
        network(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    return features


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        resnet,
        lambda: resnet("BN"),
        lambda: resnet("SyncBN"),
        lambda: trained(MobileNetV2(width_mult=0.25)),
        lambda: trained(MobileNetV2(width_mult=0.25, norm="BN")),
        lambda: trained(ShuffleNetV2(width_mult=0.5)),
    ],
    ids=["FrozenBN", "BN", "SyncBN", "MobileNetV2", "MobileNetV2-BN", "ShuffleNetV2"],
)
def test_what_is_read_before_activations_stays_and_the_norms_are_gone(build):
    network = build()
    expected = read(copy.deepcopy(network))
    norms = sum("running_mean" in name for name in network.state_dict())
    assert norms > 0 and fuse_conv_bn(network) == norms
    assert not any("running_mean" in name for name in network.state_dict())
    for name, feature in read(network).items():
        torch.testing.assert_close(feature, expected[name], rtol=0, atol=5e-6 * expected[name].abs().max().item())
    assert fuse_conv_bn(network) == 0


def test_against_the_formula_of_a_batch_norm_in_numpy():
    convolution = Conv2d(4, 6, 3, groups=2, bias=True, norm=nn.BatchNorm2d(6), activation=F.relu)
    trained(convolution)
    norm, eps = convolution.norm, convolution.norm.eps
    mean, var, gain, shift, weight, bias = (
        t.detach().double().numpy()
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias, convolution.weight, convolution.bias)
    )
    assert fuse_conv_bn(convolution) == 1 and convolution.norm is None
    scale = gain / np.sqrt(var + eps)
    np.testing.assert_allclose(convolution.weight.detach().numpy(), weight * scale.reshape(-1, 1, 1, 1), rtol=1e-6)
    np.testing.assert_allclose(convolution.bias.detach().numpy(), (bias - mean) * scale + shift, rtol=1e-5, atol=1e-6)
    assert convolution.activation is F.relu


class AndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Backwards(nn.Sequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


def read_by_a_hook(convolution, norm):
    convolution.register_forward_hook(lambda *_: None)
    return nn.Sequential(convolution, norm)


@pytest.mark.parametrize(
    "network",
    [
        resnet("GN"),
        Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4)),  # in train mode
        nn.Sequential(nn.Conv2d(3, 4, 1), AndActivation(4)).eval(),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval(),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval(),
        nn.Sequential(Conv2d(3, 4, 1, activation=F.relu), nn.BatchNorm2d(4)).eval(),
        Backwards(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(),
        read_by_a_hook(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(),
    ],
    ids=["GN", "training", "activation in the norm", "no statistics", "activation between", "norm first"]
    + ["activation of the convolution", "another order", "read by a hook"],
)
def test_what_cannot_be_folded_stays(network):
    state = {name: value.clone() for name, value in network.state_dict().items()}
    assert fuse_conv_bn(network) == 0
    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_it_is_rounded_once():
    """float32 arithmetic would lose the small difference of a bias and a running mean that are large."""
    convolution = nn.Conv2d(1, 1, 1)
    norm = FrozenBatchNorm2d(1, eps=0.0)
    convolution.weight.data.fill_(1.0)
    convolution.bias.data.fill_(1000.125)
    norm.running_mean.fill_(1000.0)
    norm.running_var.fill_(1e-8)
    norm.bias.fill_(-1249.0)
    network = nn.Sequential(convolution, norm).eval()
    fuse_conv_bn(network)
    exact = (1000.125 - 1000.0) / np.sqrt(np.float64(np.float32(1e-8))) - 1249.0
    assert network[0].bias.item() == pytest.approx(exact, rel=1e-6)
