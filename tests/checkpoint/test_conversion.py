"""Conversion of weights by the names in file and model. Weights of another network are refused."""

import pytest
import torch
import torchvision
from checkpoint.networks import R18, R34, R50, R101, Detector
from fast_cases import fast
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer, convert_weights
from mgd_det.errors import UserError

R152 = ["MODEL.RESNETS.DEPTH", 152]


def weights(name):
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None).state_dict()


def model(student, opts=()):
    with torch.device("meta"):
        return Detector(f"build_{student}_fpn_backbone", opts).state_dict()


OTHERS = [
    ("resnet50", "resnet", R18, r"res2.0.conv1.weight is \(64, 64, 1, 1\) in the file and \(64, 64, 3, 3\)"),
    ("resnet18", "resnet", R50, "res2.0.shortcut.weight is not in the file"),
    ("resnet18", "resnet", R34, r"res2.2.conv1.weight is not in the file.*and \d+ more"),
    ("resnet34", "resnet", R18, "does not have layer1.2.conv1.weight"),
    ("resnet50", "resnet", R101, "res4.6.conv1.weight is not in the file"),
    ("resnet101", "resnet", R50, "does not have layer3.6.conv1.weight"),
    ("resnet152", "resnet", R101, "does not have layer2.4.conv1.weight"),
    ("resnext50_32x4d", "resnet", R50, r"res2.0.conv1.weight is \(128, 64, 1, 1\) in the file"),
    ("wide_resnet50_2", "resnet", R50, r"res2.0.conv1.weight is \(128, 64, 1, 1\) in the file"),
    ("mobilenet_v2", "resnet", R18, "a MobileNetV2 of torchvision.*fit none of the model's"),
    ("resnet18", "mobilenetv2", [], "a ResNet of torchvision or timm.*fit none of the model's"),
    ("mobilenet_v3_large", "mobilenetv2", [], r"features.0.0.weight is \(16, 3, 3, 3\) in the file"),
    ("mobilenet_v2", "mobilenetv3_large", [], r"features.0.0.weight is \(32, 3, 3, 3\) in the file"),
    ("mobilenet_v3_large", "mobilenetv3_small", [], "a MobileNetV3.*features.1.block.1.fc1.weight is not in"),
    ("mobilenet_v2", "mobilenetv2", ["MODEL.MOBILENETS.WIDTH_MULT", 0.5], "in the file and .* in the model"),
    ("mobilenet_v2", "mobilenetv1", [], "a MobileNetV2.*not of the model's backbone"),
    ("shufflenet_v2_x0_5", "shufflenetv2", [], r"\(24, 24, 1, 1\) in the file and \(58, 24, 1, 1\) in the model"),
]


# One of each message.
@pytest.mark.parametrize("name, student, opts, message", fast(OTHERS, *(OTHERS[i] for i in (0, 3, 9, 14, 16))))
def test_weights_of_another_network_are_refused(name, student, opts, message):
    with pytest.raises(UserError, match=message):
        convert_weights(weights(name), model(student, opts))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, other",
    [
        ("efficientnet_b1", "efficientnet_b0"),
        ("efficientnet_b0", "efficientnet_b1"),
        ("convnext_femto", "convnext_atto"),
    ],
)
def test_timm_weights_of_a_relative_are_refused(name, other):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        state_dict = timm.create_model(name).state_dict()
        features = timm.create_model(other, features_only=True).state_dict()
    with pytest.raises(UserError, match="a network of timm, but not of the model's backbone"):
        convert_weights(state_dict, {f"backbone.bottom_up.body.{key}": value for key, value in features.items()})


@pytest.mark.parametrize("name", fast(["efficientnet_b0", "vgg11", "densenet121"]))
def test_unknown_networks_are_left_as_they_are(name):
    assert convert_weights(weights(name), model("mobilenetv2")) is None


@pytest.mark.parametrize("key", ["layer1.0.se.fc1.weight", "layer1.0.conv1.weight_mask"])
def test_one_strange_tensor_makes_another_network(key):
    """A squeeze-and-excitation ResNet has all names of a ResNet; a partial match would leave layers at random."""
    assert convert_weights({**weights("resnet18"), key: torch.zeros(1)}, model("resnet", R18)) is None


def test_detectron2_names_are_left_as_they_are():
    for student, opts in (("resnet", R18), ("mobilenetv2", []), ("shufflenetv2", [])):
        assert convert_weights(model(student, opts), model(student, opts)) is None
    assert convert_weights({}, model("resnet", R18)) is None


def test_a_refusal_leaves_the_model_as_it_was(tmp_path):
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    detector = Detector("build_resnet_fpn_backbone", R18)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(UserError, match="weights .*resnet34.pth: they are weights of a ResNet"):
        WeightsCheckpointer(detector).load(str(tmp_path / "resnet34.pth"))
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


@pytest.mark.parametrize("name, opts", [("resnet18", R18), ("resnet34", R34), ("resnet152", R152)])
def test_a_resnet_fills_the_backbone_and_leaves_its_classifier(name, opts):
    state_dict, places = weights(name), model("resnet", opts)
    converted = convert_weights(state_dict, places)
    assert {key for key in places if key.startswith("backbone.bottom_up.")} == set(converted.tensors)
    left_out = {key for key in state_dict if key.startswith("fc.") or key.endswith("num_batches_tracked")}
    assert set(converted.left_out) == left_out


@pytest.mark.parametrize(
    "student, opts, name",
    [
        ("resnet", [*R18, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4"]], "resnet18"),
        ("mobilenetv2", ["MODEL.MOBILENETS.OUT_FEATURES", ["res3"]], "mobilenet_v2"),
        ("shufflenetv2", ["MODEL.SHUFFLENETS.OUT_FEATURES", ["res4"]], "shufflenet_v2_x1_0"),
    ],
)
def test_a_network_that_ends_early_is_filled(student, opts, name):
    with torch.device("meta"):
        places = Detector(f"build_{student}_backbone", opts).state_dict()
    # Names sorted, as .safetensors has them.
    converted = convert_weights(dict(sorted(weights(name).items())), places)
    assert {key for key in places if "num_batches" not in key} <= set(converted.tensors)
    assert len(converted.left_out) > 30


def test_the_first_convolution_may_be_for_other_images(tmp_path):
    detector = nn.Module()
    detector.backbone = torchvision.models.mobilenet_v2(weights=None)
    del detector.backbone.classifier
    state_dict = detector.backbone.state_dict()
    detector.backbone.features[0][0] = nn.Conv2d(1, 32, 3, bias=False)
    torch.save(state_dict, tmp_path / "weights.pth")
    checkpointer = WeightsCheckpointer(detector)
    checkpointer.load(str(tmp_path / "weights.pth"))
    assert checkpointer.unset_keys == ["backbone.features.0.0.weight"]


def test_deformable_convolutions_keep_their_zero_offsets():
    # By names alone: deformable convolutions need Detectron2's compiled part, which may be missing.
    offset = "backbone.bottom_up.res5.0.conv2_offset.weight"
    converted = convert_weights(weights("resnet50"), {**model("resnet", R50), offset: torch.zeros(18, 512, 3, 3)})
    assert offset not in converted.tensors


def test_group_norm_takes_the_affine_of_batch_norm():
    with torch.device("meta"):
        places = Detector("build_mobilenetv2_backbone", norm="GN").state_dict()
    assert set(convert_weights(weights("mobilenet_v2"), places).tensors) == set(places)


def test_the_prefixes_of_a_model():
    """A detector with and without FPN, and a backbone alone."""
    state_dict = weights("resnet18")
    for detector, expected in (
        (model("resnet", R18), "backbone.bottom_up.res2.0.conv1.norm.running_var"),
        (Detector("build_resnet_backbone", R18).state_dict(), "backbone.res2.0.conv1.norm.running_var"),
        (
            Detector("build_resnet_fpn_backbone", R18).backbone.state_dict(),
            "bottom_up.res2.0.conv1.norm.running_var",
        ),
        (Detector("build_resnet_backbone", R18).backbone.state_dict(), "res2.0.conv1.norm.running_var"),
    ):
        assert convert_weights(state_dict, detector).tensors[expected] is state_dict["layer1.0.bn1.running_var"]
