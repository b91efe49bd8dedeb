"""The MobileNets' own: channels by the papers, widths, and MobileNetV1 beside timm's."""

import pytest
import torch
import torchvision
import toy
from fast_cases import fast
from torch import nn

from mgd_det.modeling import MobileNetV1, MobileNetV2, MobileNetV3Large, MobileNetV3Small

STAGES = ["stem", "res2", "res3", "res4", "res5"]
# The tables of the papers, where the map has the stage's size last.
CHANNELS = {
    MobileNetV1: [64, 128, 256, 512, 1024],
    MobileNetV2: [16, 24, 32, 96, 320],
    MobileNetV3Large: [16, 24, 40, 112, 160],
    MobileNetV3Small: [16, 16, 24, 48, 96],
}


@pytest.mark.parametrize("student", CHANNELS)
def test_channels_of_the_paper(student):
    shapes = student(out_features=STAGES).output_shape()
    assert {name: shape.channels for name, shape in shapes.items()} == dict(zip(STAGES, CHANNELS[student]))


def test_half_width():
    assert [shape.channels for shape in MobileNetV1(width_mult=0.5).output_shape().values()] == [64, 128, 256, 512]
    assert [shape.channels for shape in MobileNetV2(width_mult=0.5).output_shape().values()] == [16, 16, 48, 160]


@pytest.mark.parametrize(
    "student, name",
    [
        (MobileNetV2, "mobilenet_v2"),
        (MobileNetV3Large, "mobilenet_v3_large"),
        (MobileNetV3Small, "mobilenet_v3_small"),
    ],
)
@pytest.mark.parametrize("width_mult", fast([0.75, 0.35, 1.4]))
def test_other_widths_are_torchvisions(student, name, width_mult):
    reference = torchvision.models.get_model(name, weights=None, width_mult=width_mult).state_dict()
    for key, value in student(width_mult=width_mult).state_dict().items():
        assert reference[key].shape == value.shape


@torch.no_grad()
def timm_mobilenetv1():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv1_100", features_only=True, out_indices=(0, 1, 2, 3, 4))
    toy.randomize_norms(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.mul_(3)  # reaches the 6 of ReLU6
    return network


@pytest.mark.slow
@torch.no_grad()
def test_mobilenetv1_computes_what_timms_does():
    reference = timm_mobilenetv1().eval()
    backbone = MobileNetV1(norm="BN", out_features=STAGES).eval()
    keys, tensors = list(backbone.state_dict()), list(reference.state_dict().values())
    assert len(keys) == len(tensors)
    backbone.load_state_dict(dict(zip(keys, tensors)))
    image = torch.randn(2, 3, 75, 101)
    for output, expected in zip(backbone(image).values(), reference(image)):
        assert expected.std() > 0.05 and (expected == 6).any()
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_mobilenetv3_keeps_torchvisions_eps_and_momentum():
    norms = [m for m in MobileNetV3Small(norm="BN").modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.001, 0.01)}
