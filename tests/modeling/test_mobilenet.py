"""MobileNetV2: declared shapes, freezing, norm layers and the features it offers to distillation."""

import math

import pytest
import torch
import torchvision
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from mgd_det import add_mgd_config
from mgd_det.distillation.features import distillation_features
from mgd_det.errors import UserError
from mgd_det.modeling.backbone import MobileNetV2

STAGES = ["stem", "res2", "res3", "res4", "res5"]
CHANNELS = {"stem": 16, "res2": 24, "res3": 32, "res4": 96, "res5": 320}
STRIDES = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
EXPANSIONS = {"res2": 144, "res3": 192, "res4": 576, "res5": 960}
# One past the last of torchvision's blocks that FREEZE_AT 0..5 freezes, by the paper's Table 2.
FROZEN_BLOCKS = [0, 2, 4, 7, 14, 18]


def mobilenet_cfg(*opts):
    cfg = get_cfg()
    add_mgd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_mobilenetv2_backbone"
    cfg.merge_from_list(list(opts))
    return cfg


def is_norm(module):
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, FrozenBatchNorm2d))


@pytest.mark.parametrize("size", [(64, 96), (75, 101), (130, 67)])
def test_declared_shapes_are_measured(size):
    backbone = MobileNetV2(out_features=STAGES).eval()
    declared = backbone.output_shape()
    with torch.no_grad():
        outputs = backbone(torch.randn(2, 3, *size))
    assert list(outputs) == list(declared) == STAGES
    for name in STAGES:
        assert (declared[name].channels, declared[name].stride) == (CHANNELS[name], STRIDES[name])
        height, width = (math.ceil(side / STRIDES[name]) for side in size)
        assert outputs[name].shape == (2, CHANNELS[name], height, width)


def test_half_width():
    backbone = build_backbone(mobilenet_cfg("MODEL.MOBILENETS.WIDTH_MULT", 0.5)).eval()
    expected = {"res2": 16, "res3": 16, "res4": 48, "res5": 160}
    assert {name: shape.channels for name, shape in backbone.output_shape().items()} == expected
    with torch.no_grad():
        outputs = backbone(torch.randn(1, 3, 64, 64))
    assert {name: output.shape[1] for name, output in outputs.items()} == expected
    torchvision_keys = torchvision.models.mobilenet_v2(width_mult=0.5).state_dict()
    for key, value in backbone.state_dict().items():
        assert torchvision_keys[key].shape == value.shape


def test_only_what_out_features_need_is_kept():
    backbone = MobileNetV2(out_features=["res4", "res2"])
    assert len(backbone.features) == 14
    assert set(backbone(torch.randn(1, 3, 32, 32))) == {"res2", "res4"}
    assert set(backbone.output_shape()) == {"res2", "res4"}
    names = {name.split(".")[0] for name in backbone.distillation_features()}
    assert names == {"res2", "res3", "res4"}


def test_keys_are_torchvisions():
    keys = MobileNetV2(norm="BN").state_dict().keys()
    expected = {
        key
        for key in torchvision.models.mobilenet_v2().state_dict()
        if not key.startswith(("features.18.", "classifier."))
    }
    assert set(keys) == expected


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at_freezes_exactly_these_parameters(freeze_at):
    backbone = build_backbone(mobilenet_cfg("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.MOBILENETS.NORM", "BN"))
    frozen_blocks = {str(i) for i in range(FROZEN_BLOCKS[freeze_at])}
    reference = torchvision.models.mobilenet_v2()
    frozen, trainable, frozen_norms, trainable_norms = set(), set(), set(), set()
    for name, module in reference.features[:18].named_modules(prefix="features"):
        is_frozen = len(name.split(".")) > 1 and name.split(".")[1] in frozen_blocks
        if isinstance(module, nn.BatchNorm2d):
            (frozen_norms if is_frozen else trainable_norms).add(name)
            if not is_frozen:
                trainable |= {f"{name}.weight", f"{name}.bias"}
        elif isinstance(module, nn.Conv2d):
            (frozen if is_frozen else trainable).add(f"{name}.weight")

    parameters = dict(backbone.named_parameters())
    assert {name for name, p in parameters.items() if not p.requires_grad} == frozen
    assert {name for name, p in parameters.items() if p.requires_grad} == trainable
    modules = dict(backbone.named_modules())
    assert {n for n, m in modules.items() if isinstance(m, FrozenBatchNorm2d)} == frozen_norms
    assert {n for n, m in modules.items() if isinstance(m, nn.BatchNorm2d)} == trainable_norms
    # A frozen norm layer keeps its statistics in training mode too.
    before = {name: modules[name].running_mean.clone() for name in frozen_norms}
    backbone.train()(torch.randn(2, 3, 64, 64))
    for name, mean in before.items():
        assert torch.equal(dict(backbone.named_modules())[name].running_mean, mean)


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at_means_what_it_means_for_resnet(freeze_at):
    cfg = mobilenet_cfg("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.RESNETS.NORM", "BN")
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.MOBILENETS.NORM = "BN"
    resnet = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    mobilenet = build_backbone(cfg)

    def state(module):
        learns = {p.requires_grad for p in module.parameters()}
        norms = {type(m) for m in module.modules() if is_norm(m)}
        return learns, {norm is FrozenBatchNorm2d for norm in norms}

    for i, name in enumerate(STAGES):
        start, stop = FROZEN_BLOCKS[i], FROZEN_BLOCKS[i + 1]
        expected = ({False}, {True}) if freeze_at > i else ({True}, {False})
        assert state(getattr(resnet, name)) == expected
        assert state(mobilenet.features[start:stop]) == expected


def test_frozen_group_norm_stays_and_does_not_learn():
    backbone = MobileNetV2(norm="GN", freeze_at=2)
    norm = backbone.features[3].conv[3]
    assert isinstance(norm, nn.GroupNorm) and not norm.weight.requires_grad
    assert backbone.features[4].conv[3].weight.requires_grad


@pytest.mark.parametrize(
    "norm, layer",
    [
        ("FrozenBN", FrozenBatchNorm2d),
        ("BN", nn.BatchNorm2d),
        ("GN", nn.GroupNorm),
        ("SyncBN", nn.SyncBatchNorm),
        (nn.InstanceNorm2d, nn.InstanceNorm2d),
    ],
)
def test_norm_kinds(norm, layer):
    backbone = MobileNetV2(norm=norm)
    norms = [module for module in backbone.modules() if is_norm(module)]
    assert len(norms) == 51  # 1 + 2 in the stem, 3 in each of the 16 other blocks
    assert {type(module) for module in norms} <= {layer, *layer.__subclasses__()}
    backbone.eval()  # SyncBN has no training mode on the CPU
    outputs = backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.isfinite(output).all() for output in outputs.values())
    outputs["res5"].sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_group_norm_groups_divide_the_channels():
    groups = {m.num_channels: m.num_groups for m in MobileNetV2(norm="GN").modules() if is_norm(m)}
    assert groups[16] == 16 and groups[24] == 8 and groups[32] == 32 and groups[144] == 16


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_distillation_features_resolve(norm):
    backbone = MobileNetV2(norm=norm, out_features=["res5"]).eval()
    features = distillation_features(backbone)
    channels = {name: CHANNELS[name] for name in EXPANSIONS}
    channels.update({f"{name}.expansion": count for name, count in EXPANSIONS.items()})
    assert set(features) == set(channels)
    measured = {}

    def keep(name):
        return lambda module, inputs, output: measured.update({name: output.shape})

    for name, spec in features.items():
        assert backbone.get_submodule(spec.norm).weight.shape == (channels[name],)
        assert backbone.get_submodule(spec.norm).bias.shape == (channels[name],)
        assert spec.norm.startswith(spec.module + ".")
        assert spec.before_activation == name.endswith(".expansion")
        backbone.get_submodule(spec.module).register_forward_hook(keep(name))
    backbone(torch.randn(1, 3, 75, 101))
    for name, count in channels.items():
        stride = STRIDES[name.split(".")[0]]
        assert measured[name] == (1, count, math.ceil(75 / stride), math.ceil(101 / stride))


def test_linear_bottleneck_is_not_rectified():
    backbone = MobileNetV2(norm="BN").train()
    for output in backbone(torch.randn(2, 3, 64, 64)).values():
        assert (output < 0).any()


def test_other_input_channels():
    cfg = mobilenet_cfg("MODEL.MOBILENETS.OUT_FEATURES", ["res2"])
    backbone = MobileNetV2(cfg, ShapeSpec(channels=4))
    assert backbone.features[0][0].weight.shape == (32, 4, 3, 3)
    assert backbone.features[0][0].weight.std() > 0.01
    assert backbone(torch.randn(1, 4, 33, 65))["res2"].shape == (1, 24, 9, 17)


def test_keywords_and_lazy_config_build_what_the_cfg_builds():
    cfg = mobilenet_cfg("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.MOBILENETS.NORM", "BN")
    from_cfg = build_backbone(cfg)
    arguments = {"norm": "BN", "freeze_at": 2, "out_features": ["res2", "res3", "res4", "res5"]}
    for built in (MobileNetV2(**arguments), instantiate(LazyCall(MobileNetV2)(**arguments))):
        built.load_state_dict(from_cfg.state_dict())
        assert built.output_shape() == from_cfg.output_shape()
        trainable = [[p.requires_grad for p in net.parameters()] for net in (built, from_cfg)]
        assert trainable[0] == trainable[1]
        assert type(built._out_features) is list


@pytest.mark.parametrize(
    "key, value, candidates",
    [
        ("MODEL.MOBILENETS.OUT_FEATURES", ["res2", "res6"], ["'res6'", "res2", "res5"]),
        ("MODEL.MOBILENETS.OUT_FEATURES", [], ["[]", "res2", "res5"]),
        ("MODEL.MOBILENETS.NORM", "BatchNorm", ["'BatchNorm'", "FrozenBN", "SyncBN", "GN"]),
        ("MODEL.MOBILENETS.NORM", "", ["''", "FrozenBN"]),
        ("MODEL.MOBILENETS.WIDTH_MULT", 0.0, ["0.0"]),
        ("MODEL.BACKBONE.FREEZE_AT", 6, ["6", "0", "5"]),
        ("MODEL.BACKBONE.FREEZE_AT", -1, ["-1", "0", "5"]),
    ],
)
def test_wrong_values_name_the_key_and_the_candidates(key, value, candidates):
    with pytest.raises(UserError) as error:
        build_backbone(mobilenet_cfg(key, value))
    for text in [key, *candidates]:
        assert text in str(error.value)
