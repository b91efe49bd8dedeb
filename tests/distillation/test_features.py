"""The features that Detectron2's ResNets and other backbones offer."""

import pytest
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import nn

from mgd_det.distillation import FeatureSpec, distillation_features


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
