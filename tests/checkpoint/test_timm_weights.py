"""Import of timm's networks: the detector's bottom-up must compute what timm's network does."""

import pytest
import torch
from checkpoint.networks import (
    R18,
    Detector,
    assert_it_computes_the_same,
    load,
    randomize,
    save,
)
from torch import nn

timm = pytest.importorskip("timm")


def network(name):
    torch.manual_seed(7)
    return timm.create_model(name, pretrained=False)


# Builder, overrides, and the modules of timm's whole network whose outputs are res2 to res5. The networks inside
# TimmBackbone keep timm's names, or join the first two parts (convnext), or put all below "body." (a hook network).
NETWORKS = {
    "resnet18": ("resnet", R18, ["layer1", "layer2", "layer3", "layer4"]),
    "mobilenetv1_100": ("mobilenetv1", [], ["blocks.1", "blocks.2", "blocks.3", "blocks.4"]),
    "efficientnet_b0": (
        "timm",
        ["MODEL.TIMM.NAME", "efficientnet_b0"],
        ["blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    ),
    "convnext_atto": ("timm", ["MODEL.TIMM.NAME", "convnext_atto"], [f"stages.{i}" for i in range(4)]),
    "mobilenetv4_conv_small": (
        "timm",
        ["MODEL.TIMM.NAME", "mobilenetv4_conv_small"],
        ["blocks.0", "blocks.1", "blocks.2", "blocks.4"],
    ),
    "regnety_002": ("timm", ["MODEL.TIMM.NAME", "regnety_002"], ["s1", "s2", "s3", "s4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_features(name, tmp_path):
    student, opts, modules = NETWORKS[name]
    net = randomize(network(name))
    for parameter_name, parameter in net.named_parameters():
        if parameter_name.endswith("gamma"):  # a layer scale of 1e-6 would hide its block
            nn.init.uniform_(parameter, 0.5, 1.0)
    assert_it_computes_the_same(net, student, opts, modules, tmp_path)


def test_the_model_decides_where_a_file_fits_several(tmp_path):
    """timm's ResNet-18 has torchvision's names: it serves Detectron2's ResNet, and the one inside TimmBackbone."""
    net = network("resnet18")
    path = save(net.state_dict(), tmp_path / "weights.pth")
    resnet = Detector("build_resnet_fpn_backbone", R18)
    load(resnet, path)
    body = Detector("build_timm_fpn_backbone", ["MODEL.TIMM.NAME", "resnet18"])
    load(body, path)
    assert torch.equal(resnet.bottom_up.res3[0].conv1.weight, net.layer2[0].conv1.weight)
    assert torch.equal(body.bottom_up.body.layer2[0].conv1.weight, net.layer2[0].conv1.weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_atto", "ghostnet_100", "legacy_xception", "fastvit_t8"])
def test_every_form_of_a_features_only_model(name):
    """Each of timm's ways to name the same tensor in a model of features, by shapes alone."""
    from mgd_det.checkpoint import convert_weights

    with torch.device("meta"):
        whole = timm.create_model(name).state_dict()
        features = timm.create_model(name, features_only=True).state_dict()
    model = {f"backbone.bottom_up.body.{key}": value for key, value in features.items()}
    converted = convert_weights(whole, model)
    assert set(converted.tensors) == set(model)
    assert all(converted.tensors[key].shape == model[key].shape for key in model)
    assert len(converted.left_out) == len(whole) - len(model)
