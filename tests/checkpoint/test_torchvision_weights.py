"""Import of torchvision's networks: the detector's bottom-up must compute what torchvision's network does."""

import pytest
import torch
import torchvision
from checkpoint.networks import (
    R18,
    R34,
    R50,
    R101,
    Detector,
    assert_it_computes_the_same,
    load,
    randomize,
    save,
)

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
SHUFFLE_STAGES = ["maxpool", "stage2", "stage3", "stage4"]
WIDTH = "MODEL.SHUFFLENETS.WIDTH_MULT"
# Student, its overrides, and where torchvision's network has the outputs of res2 to res5.
NETWORKS = {
    "resnet18": ("resnet", R18, LAYERS),
    "resnet34": ("resnet", R34, LAYERS),
    "resnet50": ("resnet", R50, LAYERS),
    "resnet101": ("resnet", R101, LAYERS),
    "mobilenet_v2": ("mobilenetv2", [], ["features.3", "features.6", "features.13", "features.17"]),
    "mobilenet_v3_large": ("mobilenetv3_large", [], ["features.3", "features.6", "features.12", "features.15"]),
    "mobilenet_v3_small": ("mobilenetv3_small", [], ["features.1", "features.3", "features.8", "features.11"]),
    "shufflenet_v2_x0_5": ("shufflenetv2", [WIDTH, 0.5], SHUFFLE_STAGES),
    "shufflenet_v2_x1_0": ("shufflenetv2", [WIDTH, 1.0], SHUFFLE_STAGES),
    "shufflenet_v2_x1_5": ("shufflenetv2", [WIDTH, 1.5], SHUFFLE_STAGES),
    "shufflenet_v2_x2_0": ("shufflenetv2", [WIDTH, 2.0], SHUFFLE_STAGES),
}


def network(name, seed=7):
    torch.manual_seed(seed)
    return torchvision.models.get_model(name, weights=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_features(name, tmp_path):
    student, opts, modules = NETWORKS[name]
    net = randomize(network(name))
    assert_it_computes_the_same(net, student, opts, modules, tmp_path)


def test_names_of_a_resnet(tmp_path):
    net = network("resnet18")
    detector = Detector("build_resnet_backbone", R18)
    load(detector, save(net.state_dict(), tmp_path / "weights.pth"))
    loaded = detector.backbone.state_dict()
    pairs = {
        "conv1.weight": "stem.conv1.weight",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer3.1.conv2.weight": "res4.1.conv2.weight",
    }
    for old, new in pairs.items():
        assert torch.equal(loaded[new], net.state_dict()[old])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_weights_without_their_classifier(name, tmp_path):
    student, opts, _ = NETWORKS[name]
    state_dict = network(name).state_dict()
    headless = {key: value for key, value in state_dict.items() if not key.startswith(("fc.", "classifier."))}
    assert len(headless) < len(state_dict)
    detector = Detector(f"build_{student}_fpn_backbone", opts)
    checkpointer = load(detector, save(headless, tmp_path / "weights.pth"))
    assert not [key for key in checkpointer.report.unused if key.startswith(("fc.", "classifier."))]
