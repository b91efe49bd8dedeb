"""What every student backbone has to keep: its declared shapes, freezing, norm layers, distillation features.

Detectron2's ResNets go through the same tests wherever they promise the same.
"""

import copy
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
import toy
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from fast_cases import fast
from torch import nn

from mgd_det import add_mgd_config
from mgd_det.distillation import FeatureHooks, distillation_features
from mgd_det.errors import UserError
from mgd_det.modeling import MobileNetV1, MobileNetV2, MobileNetV3Large, MobileNetV3Small, ShuffleNetV2

STAGES = ["stem", "res2", "res3", "res4", "res5"]
# Config node, builder, overrides.
MOBILE, SHUFFLE, RES = "MODEL.MOBILENETS", "MODEL.SHUFFLENETS", "MODEL.RESNETS"
NETWORKS = {
    "mobilenetv1": (MOBILE, "build_mobilenetv1_backbone", []),
    "mobilenetv1_0.25": (MOBILE, "build_mobilenetv1_backbone", [f"{MOBILE}.WIDTH_MULT", 0.25]),
    "mobilenetv2": (MOBILE, "build_mobilenetv2_backbone", []),
    "mobilenetv2_0.35": (MOBILE, "build_mobilenetv2_backbone", [f"{MOBILE}.WIDTH_MULT", 0.35]),
    "mobilenetv3_large": (MOBILE, "build_mobilenetv3_large_backbone", []),
    "mobilenetv3_large_0.75": (MOBILE, "build_mobilenetv3_large_backbone", [f"{MOBILE}.WIDTH_MULT", 0.75]),
    "mobilenetv3_small": (MOBILE, "build_mobilenetv3_small_backbone", []),
    "mobilenetv3_small_0.5": (MOBILE, "build_mobilenetv3_small_backbone", [f"{MOBILE}.WIDTH_MULT", 0.5]),
    "shufflenetv2_0.5": (SHUFFLE, "build_shufflenetv2_backbone", [f"{SHUFFLE}.WIDTH_MULT", 0.5]),
    "shufflenetv2": (SHUFFLE, "build_shufflenetv2_backbone", []),
    "shufflenetv2_1.5": (SHUFFLE, "build_shufflenetv2_backbone", [f"{SHUFFLE}.WIDTH_MULT", 1.5]),
    "shufflenetv2_2.0": (SHUFFLE, "build_shufflenetv2_backbone", [f"{SHUFFLE}.WIDTH_MULT", 2.0]),
    "resnet18": (RES, "build_resnet_backbone", [f"{RES}.DEPTH", 18, f"{RES}.RES2_OUT_CHANNELS", 64]),
    "resnet34": (RES, "build_resnet_backbone", [f"{RES}.DEPTH", 34, f"{RES}.RES2_OUT_CHANNELS", 64]),
    "resnet50": (RES, "build_resnet_backbone", [f"{RES}.DEPTH", 50]),
    "resnet101": (RES, "build_resnet_backbone", [f"{RES}.DEPTH", 101]),
}
STUDENTS = [name for name in NETWORKS if not name.startswith("resnet")]
# Of another width: where 32 groups do not divide the channels.
SCALED = [name for name in STUDENTS if name[-1].isdigit() and "_" in name and "." in name]
CLASSES = {
    "mobilenetv1": MobileNetV1,
    "mobilenetv2": MobileNetV2,
    "mobilenetv3_large": MobileNetV3Large,
    "mobilenetv3_small": MobileNetV3Small,
    "shufflenetv2": ShuffleNetV2,
}
FULL_WIDTH = [*CLASSES, "resnet18"]
# torchvision's network, the beginnings of the names that a detector has no use for, and its modules whose outputs
# are res2 to res5.
TORCHVISION = {
    "mobilenetv2": ("mobilenet_v2", ("features.18.", "classifier."), [f"features.{i}" for i in (3, 6, 13, 17)]),
    "mobilenetv3_large": (
        "mobilenet_v3_large",
        ("features.16.", "classifier."),
        [f"features.{i}" for i in (3, 6, 12, 15)],
    ),
    "mobilenetv3_small": (
        "mobilenet_v3_small",
        ("features.12.", "classifier."),
        [f"features.{i}" for i in (1, 3, 8, 11)],
    ),
    **{
        name: (f"shufflenet_v2_x{width}", ("conv5.", "fc."), ["maxpool", "stage2", "stage3", "stage4"])
        for name, width in [
            ("shufflenetv2_0.5", "0_5"),
            ("shufflenetv2", "1_0"),
            ("shufflenetv2_1.5", "1_5"),
            ("shufflenetv2_2.0", "2_0"),
        ]
    },
}


def network_cfg(name, *opts):
    node, builder, own_opts = NETWORKS[name]
    cfg = get_cfg()
    add_mgd_config(cfg)
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.merge_from_list([f"{node}.NORM", "BN", f"{node}.OUT_FEATURES", STAGES, *own_opts, *opts])
    return cfg


def build(name, *opts):
    torch.manual_seed(0)
    return build_backbone(network_cfg(name, *opts))


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def describe_data(network):
    """Random norm layers whose statistics are those of data, as after training: no signal fades on its way down."""
    torch.manual_seed(3)
    toy.randomize_norms(network)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
    with torch.no_grad():
        network.train()(images(96, 96, batch=4))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return network.eval()


def is_norm(module):
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, FrozenBatchNorm2d))


def sides(size, stride):
    return tuple(math.ceil(side / stride) for side in size)


# ------------------------------------------------------------------ shapes


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_declared_shapes_are_measured(name):
    backbone = describe_data(build(name))
    declared = backbone.output_shape()
    for size in [(64, 96), (75, 101), (130, 67)]:
        outputs = backbone(images(*size))
        assert list(outputs) == list(declared) == STAGES
        for stage, stride in zip(STAGES, [4 if name.startswith("resnet") else 2, 4, 8, 16, 32]):
            assert declared[stage].stride == stride
            assert outputs[stage].shape == (2, declared[stage].channels, *sides(size, stride))
            assert outputs[stage].isfinite().all() and outputs[stage].std() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_only_what_out_features_need_is_built(name):
    node, whole = NETWORKS[name][0], build(name)
    backbone = build(name, f"{node}.OUT_FEATURES", ["res4", "res2"])
    assert set(backbone(images(32, 32))) == set(backbone.output_shape()) == {"res2", "res4"}
    assert {feature.split(".")[0] for feature in backbone.distillation_features()} == {"res2", "res3", "res4"}
    # Its parameters are those that res4 depends on.
    assert {n for n, _ in backbone.named_parameters()} == set().union(*parameters_of_stages(whole)[:4])


@pytest.mark.parametrize("name", CLASSES)
def test_other_input_channels(name):
    node = NETWORKS[name][0]
    cfg = network_cfg(name, f"{node}.OUT_FEATURES", ["res2"])
    backbone = CLASSES[name](cfg, ShapeSpec(channels=4))
    conv = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    assert conv.weight.shape[1] == conv.in_channels == 4 and conv.weight.std() > 0.01
    assert backbone(torch.randn(2, 4, 33, 65))["res2"].shape[2:] == (9, 17)


# ------------------------------------------------------------------ freezing


def parameters_of_stages(network):
    """The parameters of each stage: those that its output depends on and the outputs before it do not."""
    outputs = network.train()(images(64, 64))
    parameters, seen, stages = dict(network.named_parameters()), set(), []
    for stage in STAGES:
        grads = torch.autograd.grad(outputs[stage].sum(), parameters.values(), retain_graph=True, allow_unused=True)
        reached = {name for name, grad in zip(parameters, grads) if grad is not None}
        stages.append(reached - seen)
        seen |= reached
    assert seen == set(parameters)
    return stages


@cache
def reference_stages(name):
    network = build(name)
    return parameters_of_stages(network), {n for n, m in network.named_modules() if is_norm(m)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, freeze_at",
    # Every depth for one network of each kind, and two for the others.
    [(name, n) for name in FULL_WIDTH for n in (range(6) if name in ("mobilenetv2", "shufflenetv2") else (1, 3))],
)
def test_freeze_at_freezes_exactly_the_first_stages(name, freeze_at):
    stages, norms = reference_stages(name)
    frozen = set().union(*stages[:freeze_at])
    backbone = build(name, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    parameters = dict(backbone.named_parameters())
    learns = {n for n, p in parameters.items() if p.requires_grad}
    assert learns == set().union(*stages) - frozen
    # What is frozen is a parameter that does not learn, or a buffer of a frozen batch norm.
    assert set(parameters) - learns == {n for n in frozen if n.rpartition(".")[0] not in norms}
    kinds = {n: type(m) for n, m in backbone.named_modules() if is_norm(m)}
    frozen_norms = {n for n in norms if f"{n}.weight" in frozen}
    assert {n for n, kind in kinds.items() if kind is FrozenBatchNorm2d} == frozen_norms
    assert {n for n, kind in kinds.items() if kind is nn.BatchNorm2d} == norms - frozen_norms

    before = {n: b.clone() for n, b in backbone.named_buffers()}
    outputs = backbone.train()(images(64, 64))
    if learns:
        sum(output.sum() for output in outputs.values() if output.requires_grad).backward()
    assert {n for n, p in parameters.items() if p.grad is not None} == learns
    # A frozen norm layer keeps its statistics in training mode too.
    changed = {n for n, b in backbone.named_buffers() if not torch.equal(b, before[n])}
    assert {n.rpartition(".")[0] for n in changed} == norms - frozen_norms


@pytest.mark.parametrize("name", fast(CLASSES))
def test_a_frozen_group_norm_stays_and_does_not_learn(name):
    node = NETWORKS[name][0]
    backbone = build(name, f"{node}.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 1)
    groups = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.GroupNorm)}
    stages, norms = reference_stages(name)
    assert set(groups) == norms
    for path, norm in groups.items():
        assert norm.weight.requires_grad == norm.bias.requires_grad == (f"{path}.weight" not in stages[0])


# ------------------------------------------------------------------ norm layers


NORMS = {"FrozenBN": FrozenBatchNorm2d, "BN": nn.BatchNorm2d, "GN": nn.GroupNorm, "SyncBN": nn.SyncBatchNorm}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, norm", [(name, norm) for name in CLASSES for norm in NORMS] + [(name, "GN") for name in SCALED]
)
def test_norm_layers_follow_the_config(name, norm):
    kind = NORMS[norm]
    backbone = build(name, f"{NETWORKS[name][0]}.NORM", norm)
    norms = {n: m for n, m in backbone.named_modules() if is_norm(m)}
    # All that is not a convolution and has weights is a norm layer, but for squeeze-and-excitation's biases.
    tensors = {n.rpartition(".")[0] for n in backbone.state_dict() if n.endswith((".weight", ".bias"))}
    assert set(norms) == {n for n in tensors if not isinstance(backbone.get_submodule(n), nn.Conv2d)}
    assert {type(m) for m in norms.values()} == {kind}
    for layer in norms.values():
        if kind is nn.GroupNorm:
            assert layer.num_groups == math.gcd(32, layer.num_channels)
    backbone.eval()  # SyncBN has no training mode on the CPU
    outputs = backbone(images(64, 64))
    assert all(output.isfinite().all() for output in outputs.values())
    outputs["res5"].sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


# ------------------------------------------------------------------ torchvision's networks


@cache
def torchvision_features(name):
    """torchvision's network with random weights; names and outputs of its stages for one batch."""
    torch.manual_seed(0)
    model, _, modules = TORCHVISION[name]
    network = describe_data(torchvision.models.get_model(model, weights=None))
    features, handles = {}, []
    for stage, path in zip(STAGES[1:], modules):

        def keep(module, args, output, stage=stage):
            features[stage] = output.clone()

        handles.append(network.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        network(images(75, 101))
    for handle in handles:
        handle.remove()
    return network, features


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, norm",
    [(name, "BN") for name in TORCHVISION] + [("mobilenetv2", "FrozenBN"), ("shufflenetv2", "FrozenBN")],
)
@torch.no_grad()
def test_features_and_names_are_torchvisions(name, norm):
    network, expected = torchvision_features(name)
    unused = TORCHVISION[name][1]
    state_dict = {key: value for key, value in network.state_dict().items() if not key.startswith(unused)}
    backbone = build(name, f"{NETWORKS[name][0]}.NORM", norm).eval()
    if norm == "BN":
        assert set(backbone.state_dict()) == set(state_dict)
    assert not backbone.load_state_dict(state_dict, strict=False).missing_keys
    outputs = backbone(images(75, 101))
    for stage, feature in expected.items():
        assert feature.std() > 0.1
        torch.testing.assert_close(outputs[stage], feature, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ distillation features

# By the beginning of the network's name: the activation between "resN" and the output of stage resN, and the stages
# whose last block expands its channels.
DISTILLED = {
    "mobilenetv1": (F.relu6, []),
    "mobilenetv2": (torch.clone, ["res2", "res3", "res4", "res5"]),
    "mobilenetv3_large": (torch.clone, ["res2", "res3", "res4", "res5"]),
    "mobilenetv3_small": (torch.clone, ["res3", "res4", "res5"]),
    "shufflenetv2": (F.relu, []),
    "resnet": (F.relu, []),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, training",
    [(name, True) for name in [*STUDENTS, "resnet18", "resnet50"]] + [(name, False) for name in FULL_WIDTH],
)
def test_distillation_features(name, training):
    backbone = describe_data(build(name)).train(training)
    activation, expanding = next(x for prefix, x in DISTILLED.items() if name.startswith(prefix))
    specs = distillation_features(backbone)
    assert set(specs) == {*STAGES[1:], *(f"{stage}.expansion" for stage in expanding)}
    # What a feature's norm layer gives, kept before anything in place can touch it.
    of_norms = {}
    for feature, spec in specs.items():
        if spec.norm is not None:
            assert spec.norm.startswith(f"{spec.module}.")
            norm = backbone.get_submodule(spec.norm)
            assert isinstance(norm, nn.BatchNorm2d)
            norm.register_forward_hook(
                lambda module, args, output, feature=feature: of_norms.update({feature: output.detach().clone()})
            )

    size = (75, 101)
    plain = copy.deepcopy(backbone)(images(*size))
    with FeatureHooks(backbone, specs).reading() as features:
        outputs = backbone(images(*size))
    assert set(features) == set(specs)
    for feature, value in features.items():
        stage, _, expansion = feature.partition(".")
        assert value.shape[2:] == sides(size, backbone.output_shape()[stage].stride)
        assert value.min() < -0.1, feature
        if feature in of_norms:
            assert of_norms[feature].shape == value.shape
        if expansion:
            assert value.shape[1] > outputs[stage].shape[1]
        else:
            assert torch.equal(activation(value), outputs[stage])
        if expansion or name.startswith("mobilenetv1"):
            assert torch.equal(value, of_norms[feature])
    # To read changes nothing.
    for stage, output in outputs.items():
        assert torch.equal(output, plain[stage])
    assert all(spec.norm is None for spec in specs.values()) == name.startswith("shufflenet")


# ------------------------------------------------------------------ copies and exports


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_a_deep_copy_is_a_network_of_its_own(name):
    backbone = describe_data(build(name, "MODEL.BACKBONE.FREEZE_AT", 2))
    expected = backbone(images(64, 64))
    other = copy.deepcopy(backbone)
    for parameter in other.parameters():
        parameter.zero_()
    assert other(images(64, 64))["res5"].std() == 0
    after = backbone(images(64, 64))
    assert all(torch.equal(after[stage], expected[stage]) for stage in STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLASSES, "resnet18"])
@torch.no_grad()
def test_traced_and_exported_networks_give_the_same(name):
    backbone = describe_data(build(name, f"{NETWORKS[name][0]}.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 2))
    example, other = images(64, 96), images(64, 96).flip(0, 3)
    expected = backbone(other)
    for exported in (
        torch.jit.trace(backbone, example, strict=False),
        torch.export.export(backbone, (example,)).module(),
    ):
        outputs = exported(other)
        assert list(outputs) == STAGES
        for stage in STAGES:
            torch.testing.assert_close(outputs[stage], expected[stage], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ construction


@pytest.mark.parametrize("name", fast(CLASSES))
def test_keywords_and_lazy_config_build_what_the_cfg_builds(name):
    arguments = {"norm": "BN", "freeze_at": 2, "out_features": STAGES}
    from_cfg = build(name, "MODEL.BACKBONE.FREEZE_AT", 2)
    for built in (CLASSES[name](**arguments), instantiate(LazyCall(CLASSES[name])(**arguments))):
        built.load_state_dict(from_cfg.state_dict())
        assert built.output_shape() == from_cfg.output_shape()
        trainable = [[n for n, p in net.named_parameters() if p.requires_grad] for net in (built, from_cfg)]
        assert trainable[0] == trainable[1]
        assert type(built._out_features) is list


WRONG_VALUES = [
    ("{node}.OUT_FEATURES", ["res2", "res6"], ["'res6'", "{title}", "res2", "res5"]),
    ("{node}.OUT_FEATURES", [], ["[]", "res2", "res5"]),
    ("{node}.NORM", "BatchNorm", ["'BatchNorm'", "FrozenBN", "SyncBN", "GN"]),
    ("{node}.NORM", "", ["''", "FrozenBN"]),
    ("{node}.WIDTH_MULT", 0.0, ["0.0"]),
    ("MODEL.BACKBONE.FREEZE_AT", 6, ["6", "{title}", "0", "5"]),
    ("MODEL.BACKBONE.FREEZE_AT", -1, ["-1", "{title}", "0", "5"]),
]


@pytest.mark.parametrize(
    "name, key, value, texts",
    [(name, *wrong) for name in ("mobilenetv2", "shufflenetv2") for wrong in WRONG_VALUES],
)
def test_wrong_values_name_the_key_and_the_candidates(name, key, value, texts):
    names = {"node": NETWORKS[name][0], "title": CLASSES[name].__name__}
    with pytest.raises(UserError) as error:
        build(name, key.format(**names), value)
    for text in (key, *texts):
        assert text.format(**names) in str(error.value)
