"""torch.compile of a network whose features are read."""

import functools
import logging
import shutil

import pytest
import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from torch import nn

from mgd_det.distillation import FeatureHooks, compilation, distillation_features
from mgd_det.distillation.compilation import compile_around


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    compilation._problem.cache_clear()
    yield
    torch._dynamo.reset()
    compilation._problem.cache_clear()


@pytest.fixture
def traced_only(monkeypatch):
    """Graphs are traced and run without a compiler: seconds instead of a minute."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr(compilation, "_problem", lambda device: "")


def resnet():
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(BasicBlock, 2, stride_per_block=[stride, 1], in_channels=8, out_channels=o, norm="BN")
        for stride, o in ((1, 8), (2, 12))
    ]
    return ResNet(BasicStem(3, 8, norm="BN"), stages, out_features=["res2", "res3"])


def features_and_gradients(network, taps, images):
    network.zero_grad()
    with taps.reading() as features:
        network(images)
    sum(feature.square().mean() for feature in features.values()).backward()
    return features, [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.slow
def test_features_and_gradients_stay_at_every_size(traced_only):
    networks = [resnet(), resnet()]
    taps = [FeatureHooks(network, distillation_features(network)) for network in networks]
    blocks = [networks[1].res2[1], networks[1].res3[1]]
    # The stem and the first block of either stage.
    assert compile_around(networks[1], blocks, "KEY") == 3
    for size in ((2, 3, 32, 32), (3, 3, 64, 96)):
        images = torch.randn(size, generator=torch.Generator().manual_seed(1))
        (plain, gradients), (compiled, own) = (features_and_gradients(n, t, images) for n, t in zip(networks, taps))
        assert list(compiled) == ["res2", "res3"] and compiled["res2"].min() < 0
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own, gradients, rtol=1e-4, atol=1e-6)
    assert list(networks[0].state_dict()) == list(networks[1].state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_machine_that_cannot_compile_goes_on_with_one_warning(monkeypatch, caplog):
    def broken(function):
        raise RuntimeError("no working C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    network = resnet().eval()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert compile_around(network, [network.res2[1]], "MODEL.MGD.TEACHER.COMPILE") == 0
        assert network(torch.zeros(1, 3, 32, 32))["res3"].shape == (1, 12, 4, 4)
    (record,) = caplog.records
    assert "MODEL.MGD.TEACHER.COMPILE is on" in record.message and "C++ compiler" in record.message
    assert "more" not in record.message


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_with_the_real_compiler(monkeypatch):
    monkeypatch.setattr(compilation, "_problem", lambda device: "")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(images)
        assert compile_around(network, [network[1]], "KEY") == 1
        torch.testing.assert_close(network(images), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
