"""The features that Detectron2's ResNets and other backbones offer."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import nn

from mgd_det.distillation import FeatureHooks, FeatureSpec, distillation_features


def resnet(depth, norm="FrozenBN"):
    return ResNet(BasicStem(norm=norm), ResNet.make_default_stages(depth, norm=norm))


@pytest.mark.parametrize(
    "depth, block, conv, last",
    [(18, BasicBlock, "conv2", [1, 1, 1, 1]), (50, BottleneckBlock, "conv3", [2, 3, 5, 2])],
)
def test_the_stages_of_a_resnet_from_shallow_to_deep(depth, block, conv, last):
    network = resnet(depth)
    features = distillation_features(network)
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for (name, spec), index in zip(features.items(), last):
        assert spec == FeatureSpec(f"{name}.{index}", True, f"{name}.{index}.{conv}.norm")
        module = network.get_submodule(spec.module)
        assert isinstance(module, block) and module is getattr(network, name)[-1]
        norm = network.get_submodule(spec.norm)
        assert isinstance(norm, FrozenBatchNorm2d) and norm.num_features == module.out_channels


def test_a_resnet_without_norm_layers():
    specs = distillation_features(resnet(18, norm="")).values()
    assert [spec.norm for spec in specs] == [None] * 4


def test_a_backbone_that_declares_its_own():
    class Declares(nn.Module):
        def distillation_features(self):
            return {"p3": FeatureSpec("head.3", False)}

    assert distillation_features(Declares()) == {"p3": FeatureSpec("head.3", False)}


def test_a_backbone_that_is_not_known_has_none():
    assert distillation_features(nn.Sequential(nn.ReLU())) == {}


# ------------------------------------------------------------------ FPN


def fpn(top_block, norm=""):
    stages = ["res3", "res4", "res5"]
    bottom_up = ResNet(BasicStem(), ResNet.make_default_stages(18), out_features=stages)
    return FPN(bottom_up, stages, 32, norm=norm, top_block=top_block)


def test_an_fpn_has_its_stages_and_its_levels():
    network = fpn(LastLevelP6P7(512, 32), norm="GN")
    features = distillation_features(network)
    assert list(features) == ["res2", "res3", "res4", "res5", "p3", "p4", "p5", "p6", "p7"]
    assert features["res4"] == FeatureSpec("bottom_up.res4.1", True, "bottom_up.res4.1.conv2.norm")
    assert features["p4"] == FeatureSpec("fpn_output4", False, "fpn_output4.norm")
    assert features["p7"] == FeatureSpec("top_block.p7", False, None)
    for spec in features.values():
        assert isinstance(network.get_submodule(spec.module), nn.Module)


def test_levels_without_norm_layers_and_without_a_convolution():
    features = distillation_features(fpn(LastLevelMaxPool()))
    assert "p6" not in features  # of the R-CNNs: p5 subsampled
    assert features["p5"] == FeatureSpec("fpn_output5", False, None)


def test_levels_are_read_as_the_fpn_returns_them():
    torch.manual_seed(0)
    network = fpn(LastLevelP6P7(512, 32)).eval()
    specs = {name: spec for name, spec in distillation_features(network).items() if name.startswith("p")}
    with torch.no_grad(), FeatureHooks(network, specs).reading() as features:
        outputs = network(torch.randn(1, 3, 96, 64))
    assert set(features) == set(outputs) == {"p3", "p4", "p5", "p6", "p7"}
    assert all(torch.equal(features[name], outputs[name]) for name in outputs)
