"""Import of torchvision's weights: the detector's bottom-up must compute what torchvision's network does."""

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from mgd_det import add_mgd_config
from mgd_det.checkpoint import (
    convert_torchvision_weights,
    is_torchvision_weights,
    torchvision_weights_url,
)
from mgd_det.errors import UserError

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
LAST_BLOCKS = {"res2": 3, "res3": 6, "res4": 13, "res5": 17}


def random_network(name):
    """torchvision's network with random weights, affines and running statistics, in eval mode.

    The statistics come from random images, so that the signal neither fades nor explodes on its way down
    and no stage is compared on zeros, and are then shaken.
    """
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    net = torchvision.models.get_model(name, weights=None)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, 0.0, 0.3, generator=generator)
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 64, 64, generator=generator))
    for norm in norms:
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn(norm.running_mean.shape)
        norm.running_var *= 0.8 + 0.4 * torch.rand(norm.running_var.shape)
    return net.eval()


class Detector(nn.Module):
    """What a meta-architecture calls its backbone."""

    def __init__(self, name, norm, depth=None):
        super().__init__()
        cfg = get_cfg()
        add_mgd_config(cfg)
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.BACKBONE.NAME = name
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 16
        cfg.MODEL.MOBILENETS.NORM = cfg.MODEL.RESNETS.NORM = norm
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
        if depth is not None:
            cfg.MODEL.RESNETS.DEPTH = depth
            cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
        self.backbone = build_backbone(cfg)


def load(detector, state_dict):
    """Loads into the whole detector; every tensor finds its place and the bottom-up lacks none."""
    result = detector.load_state_dict(convert_torchvision_weights(state_dict), strict=False)
    assert result.unexpected_keys == []
    lacking = [key for key in result.missing_keys if key.startswith("backbone.bottom_up.")]
    assert [key for key in lacking if not key.endswith("num_batches_tracked")] == []
    return detector.eval().backbone.bottom_up


def capture(modules, run):
    """Outputs of modules by name, cloned before an in-place activation can change them."""
    outputs = {}

    def keep(name):
        return lambda module, inputs, output: outputs.update({name: output.clone()})

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return outputs


def read_feature(bottom_up, spec, image):
    """A feature as its FeatureSpec says: the module's output, or what its last ReLU6 is given."""
    module = bottom_up.get_submodule(spec.module)
    if not spec.before_activation:
        return capture({"feature": module}, lambda: bottom_up(image))["feature"]
    activation = [child for child in module.modules() if isinstance(child, nn.ReLU6)][-1]
    inputs = []
    handle = activation.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    with torch.no_grad():
        bottom_up(image)
    handle.remove()
    return inputs[0]


def assert_same(actual, expected):
    assert expected.std() > 0.05  # a signal that has faded to nothing would agree with anything
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("size", [(64, 96), (75, 101)])
def test_mobilenetv2_computes_torchvisions_features(norm, size):
    net = random_network("mobilenet_v2")
    image = torch.randn(2, 3, *size)
    bottom_up = load(Detector("build_mobilenetv2_fpn_backbone", norm), net.state_dict())
    modules = {name: net.features[i] for name, i in LAST_BLOCKS.items()}
    # Batch norm of the expansion: conv.0 is convolution, norm, ReLU6.
    modules.update({f"{name}.expansion": net.features[i].conv[0][1] for name, i in LAST_BLOCKS.items()})
    expected = capture(modules, lambda: net(image))
    with torch.no_grad():
        outputs = bottom_up(image)
    for name in LAST_BLOCKS:
        assert_same(outputs[name], expected[name])
    specs = bottom_up.distillation_features()
    assert set(specs) == set(expected)
    for name, spec in specs.items():
        assert_same(read_feature(bottom_up, spec, image), expected[name])
        assert (expected[name] < 0).any()  # read before any rectifier


@pytest.mark.parametrize("depth, norm", [(18, "FrozenBN"), (18, "BN"), (50, "FrozenBN")])
def test_resnet_computes_torchvisions_features(depth, norm):
    net = random_network(f"resnet{depth}")
    image = torch.randn(1, 3, 75, 101)
    bottom_up = load(Detector("build_resnet_fpn_backbone", norm, depth), net.state_dict())
    layers = {"res2": net.layer1, "res3": net.layer2, "res4": net.layer3, "res5": net.layer4}
    expected = capture(layers, lambda: net(image))
    with torch.no_grad():
        outputs = bottom_up(image)
    for name in layers:
        assert_same(outputs[name], expected[name])


@pytest.mark.parametrize("name", [*RESNETS, "mobilenet_v2"])
def test_every_tensor_but_the_classifiers_is_converted(name):
    with torch.device("meta"):
        state_dict = torchvision.models.get_model(name, weights=None).state_dict()
    untouched = dict(state_dict)
    assert is_torchvision_weights(state_dict)
    converted = convert_torchvision_weights(state_dict)
    dropped = ("fc.", "classifier.", "features.18.")
    kept = [k for k in state_dict if not k.startswith(dropped) and "num_batches_tracked" not in k]
    assert [id(value) for value in converted.values()] == [id(untouched[key]) for key in kept]
    assert all(key.startswith("backbone.bottom_up.") for key in converted)
    assert list(state_dict) == list(untouched)
    assert not is_torchvision_weights(converted)


def test_names_of_a_resnet():
    with torch.device("meta"):
        state_dict = torchvision.models.resnet50().state_dict()
    converted = convert_torchvision_weights(state_dict, prefix="")
    pairs = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.bn1.running_mean": "res2.0.conv1.norm.running_mean",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer4.0.downsample.1.bias": "res5.0.shortcut.norm.bias",
        "layer3.5.bn3.weight": "res4.5.conv3.norm.weight",
    }
    for old, new in pairs.items():
        assert converted[new] is state_dict[old]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_weights_without_their_classifier_are_recognised(name):
    with torch.device("meta"):
        state_dict = torchvision.models.get_model(name, weights=None).state_dict()
    headless = {k: v for k, v in state_dict.items() if not k.startswith(("fc.", "classifier."))}
    assert set(convert_torchvision_weights(headless)) == set(convert_torchvision_weights(state_dict))


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "shufflenet_v2_x1_0", "vgg11", "densenet121", "efficientnet_b0"]
)
def test_other_networks_are_refused(name):
    with torch.device("meta"):
        state_dict = torchvision.models.get_model(name, weights=None).state_dict()
    assert not is_torchvision_weights(state_dict)
    with pytest.raises(UserError, match="neither a ResNet's nor a MobileNetV2's") as error:
        convert_torchvision_weights(state_dict)
    assert next(iter(state_dict)) in str(error.value)


def test_detectron2_and_partial_weights_are_refused():
    state_dict = torchvision.models.resnet18().state_dict()
    assert not is_torchvision_weights(Detector("build_resnet_fpn_backbone", "BN", 18).state_dict())
    assert not is_torchvision_weights({})
    assert not is_torchvision_weights({"model": state_dict})
    assert not is_torchvision_weights({k: v for k, v in state_dict.items() if not k.startswith("layer4")})
    # One tensor that a plain ResNet does not have: another architecture.
    for key in ("layer1.0.se.fc1.weight", "layer1.0.conv1.weight_mask"):
        assert not is_torchvision_weights({**state_dict, key: torch.zeros(1)})


@pytest.mark.parametrize("name", [*RESNETS, "mobilenet_v2"])
def test_url_of_known_weights(name):
    url = torchvision_weights_url(f"torchvision://{name}")
    assert url.startswith(f"https://download.pytorch.org/models/{name}-") and url.endswith(".pth")
    assert torchvision_weights_url(name) == url


@pytest.mark.parametrize(
    "name, hint",
    [
        ("torchvision://resnet19", "Did you mean torchvision://resnet18"),
        ("torchvision://MobileNetV2", "Did you mean torchvision://mobilenet_v2"),
        ("torchvision://vgg16", "Choose from torchvision://mobilenet_v2"),
        ("torchvision://", "Choose from torchvision://mobilenet_v2"),
    ],
)
def test_unknown_weights_get_suggestions(name, hint):
    with pytest.raises(UserError) as error:
        torchvision_weights_url(name)
    assert repr(name) in str(error.value) and hint in str(error.value)
