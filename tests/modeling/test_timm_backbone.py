"""Networks of timm as backbones, against timm's own feature extractors."""

import copy
import subprocess
import sys
from functools import cache
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
import toy
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.structures import ImageList
from fast_cases import fast
from torch import nn

from mgd_det import add_mgd_config
from mgd_det.distillation import FeatureHooks, distillation_features
from mgd_det.errors import UserError
from mgd_det.modeling import TimmBackbone

timm = pytest.importorskip("timm")

STAGES = ["stem", "res2", "res3", "res4", "res5"]
# What a network's stem is made of, by its papers' tables: layers with parameters, by the names that timm gives them.
STEMS = {
    "resnet18": ["conv1", "bn1"],
    "resnet26d": ["conv1", "bn1"],
    "regnety_002": ["stem"],
    "mobilenetv1_100": ["conv_stem", "bn1", "blocks.0"],
    "mobilenetv3_large_100": ["conv_stem", "bn1", "blocks.0"],
    "mobilenetv4_conv_small": ["conv_stem", "bn1"],
    "mnasnet_small": ["conv_stem", "bn1", "blocks.0"],
    "tf_efficientnet_b0": ["conv_stem", "bn1", "blocks.0"],
    "ghostnet_100": ["conv_stem", "bn1", "blocks_0"],
    "rexnet_100": ["stem", "features_0"],
    "cspnext_tiny": ["model.stem"],
    "ese_vovnet19b_slim": ["stem_0", "stem_1", "stem_2"],
    "convnext_atto": ["stem_0", "stem_1"],
}
NETWORKS = list(STEMS)
# They cut off what is left over at the border of a map; their stems reduce it to a quarter.
CUTTING = ["convnext_atto", "ese_vovnet19b_slim"]
SIZES = [(75, 101), (130, 67), (97, 159)]


def timm_cfg(name, *opts):
    cfg = get_cfg()
    add_mgd_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.merge_from_list(["MODEL.TIMM.NAME", name, "MODEL.TIMM.NORM", "BN", "MODEL.TIMM.OUT_FEATURES", STAGES, *opts])
    return cfg


def build(name, *opts):
    return build_backbone(timm_cfg(name, *opts))


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@cache
def reference(name):
    """timm's feature extractor with random weights, none of them zero, and its features by stride."""
    torch.manual_seed(0)
    network = timm.create_model(name, features_only=True).eval()
    toy.randomize_norms(network)
    for key, parameter in network.named_parameters():
        if key.endswith("gamma"):  # ConvNeXt's layer scale, 1e-6: its blocks would compute nothing
            nn.init.uniform_(parameter, 0.1, 0.5)
    return network


def reference_features(name, x):
    network = reference(name)
    return dict(zip(network.feature_info.reduction(), network(x)))


def with_reference_weights(name, *opts):
    backbone = build(name, *opts).eval()
    state_dict = {f"body.{key}": value for key, value in reference(name).state_dict().items()}
    report = backbone.load_state_dict(state_dict, strict=False)
    assert not report.missing_keys
    assert all(key.endswith("num_batches_tracked") for key in report.unexpected_keys)
    return backbone


# ------------------------------------------------------------------ shapes and values


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_declared_shapes_are_measured(name):
    backbone = build(name).eval()
    declared = backbone.output_shape()
    channels = dict(zip(reference(name).feature_info.reduction(), reference(name).feature_info.channels()))
    assert [declared[stage].stride for stage in STAGES] == [4 if name in CUTTING else 2, 4, 8, 16, 32]
    assert [declared[stage].channels for stage in STAGES[1:]] == [channels[stride] for stride in (4, 8, 16, 32)]
    assert backbone.size_divisibility == (32 if name in CUTTING else 0)
    for size in SIZES:
        padded = ImageList.from_tensors([images(*size)[0]], backbone.size_divisibility).tensor
        assert padded.shape[-2:] == size if name not in CUTTING else padded.shape[-1] % 32 == 0
        outputs = backbone(padded)
        assert list(outputs) == list(declared) == STAGES
        for stage, output in outputs.items():
            sides = tuple(-(-side // declared[stage].stride) for side in padded.shape[-2:])
            assert output.shape == (1, declared[stage].channels, *sides)


@pytest.mark.parametrize("name", CUTTING)
@torch.no_grad()
def test_networks_that_need_padding_do(name):
    sides = [output.shape[-2] for output in build(name).eval()(images(75, 75)).values()]
    assert sides != [-(-75 // stride) for stride in (4, 4, 8, 16, 32)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_fpn_on_images_of_any_size(name):
    cfg = timm_cfg(name, "MODEL.BACKBONE.NAME", "build_retinanet_timm_fpn_backbone")
    cfg.merge_from_list(["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 8])
    fpn = build_backbone(cfg).eval()
    for size in SIZES:
        # As a Detectron2 detector pads its batches.
        batch = ImageList.from_tensors(list(images(*size)), fpn.size_divisibility, 0.0, fpn.padding_constraints)
        outputs = fpn(batch.tensor)
        assert list(outputs) == ["p3", "p4", "p5", "p6", "p7"]
        for level, output in outputs.items():
            assert output.shape == (2, 8, *(-(-side // 2 ** int(level[1])) for side in batch.tensor.shape[-2:]))


@pytest.mark.slow
@pytest.mark.parametrize("name, norm", list(zip(NETWORKS, cycle(["FrozenBN", "BN", "SyncBN"]))))
@torch.no_grad()
def test_features_are_timms(name, norm):
    backbone = with_reference_weights(name, "MODEL.TIMM.NORM", norm)
    x = images(75, 101)
    outputs, expected = backbone(x), reference_features(name, x)
    for stage, stride in zip(STAGES[1:], (4, 8, 16, 32)):
        assert expected[stride].std() > 1e-3
        # Frozen batch norms multiply and add, which rounds otherwise.
        scale = float(expected[stride].abs().max())
        torch.testing.assert_close(
            outputs[stage], expected[stride], rtol=0, atol=0 if norm != "FrozenBN" else 1e-5 * scale
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small", "efficientnet_lite0", "cspnext_tiny"])
def test_only_what_out_features_need_is_built(name):
    backbone = build(name, "MODEL.TIMM.OUT_FEATURES", ["res4", "res2"])
    outputs = backbone(images(64, 64))
    assert set(outputs) == set(backbone.output_shape()) == {"res2", "res4"}
    assert {feature.split(".")[0] for feature in backbone.distillation_features()} == {"res2", "res3", "res4"}
    outputs["res4"].sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", fast(["resnet18", "convnext_atto", "tf_efficientnet_b0"]))
def test_other_input_channels(name):
    cfg = timm_cfg(name, "MODEL.TIMM.OUT_FEATURES", ["res2"])
    backbone = TimmBackbone(cfg, ShapeSpec(channels=4))
    assert backbone(torch.randn(2, 4, 64, 96))["res2"].shape[2:] == (16, 24)
    assert set(backbone.distillation_features()) >= {"res2"}


# ------------------------------------------------------------------ freezing


@cache
def parameters_of_stages(name):
    """What each stage owns: res3 to res5 what their feature of timm's depends on and the one before does not."""
    network = reference(name)
    features = dict(zip(network.feature_info.reduction(), network(images(64, 64))))
    parameters, seen, stages = dict(network.named_parameters()), set(), []
    for stride in (4, 8, 16, 32):
        grads = torch.autograd.grad(features[stride].sum(), parameters.values(), retain_graph=True, allow_unused=True)
        reached = {f"body.{key}" for key, grad in zip(parameters, grads) if grad is not None}
        stages.append(reached - seen)
        seen |= reached
    stem = {key for key in stages[0] if any(key.startswith(f"body.{layer}.") for layer in STEMS[name])}
    return [stem, stages[0] - stem, *stages[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("name, freeze_at", [*zip(NETWORKS, cycle([1, 2])), ("resnet18", 5)])
def test_freeze_at_freezes_exactly_the_first_stages(name, freeze_at):
    stages = parameters_of_stages(name)
    frozen, trained = set().union(*stages[:freeze_at]), set().union(*stages[freeze_at:])
    backbone = build(name, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    assert all(stages) and len(frozen) + len(trained) == sum(map(len, stages))
    before = {key: buffer.clone() for key, buffer in backbone.named_buffers()}
    outputs = backbone.train()(images(64, 64))
    if trained:
        sum(output.sum() for output in outputs.values() if output.requires_grad).backward()
    assert {key for key, parameter in backbone.named_parameters() if parameter.grad is not None} == trained
    assert {key for key, parameter in backbone.named_parameters() if parameter.requires_grad} == trained
    assert frozen <= set(backbone.state_dict())
    changed = {key.rpartition(".")[0] for key, b in backbone.named_buffers() if not torch.equal(b, before[key])}
    norms = {key for key, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert changed == norms == {key for key in norms if f"{key}.weight" in trained}


# ------------------------------------------------------------------ norm layers


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, norm, kind",
    [
        ("resnet18", "SyncBN", nn.SyncBatchNorm),
        ("regnety_002", "BN", nn.BatchNorm2d),
        ("tf_efficientnet_b0", "FrozenBN", FrozenBatchNorm2d),
        ("tf_efficientnet_b0", "GN", nn.GroupNorm),
        ("mobilenetv4_conv_small", "SyncBN", nn.SyncBatchNorm),
    ],
)
def test_norm_layers_follow_the_config(name, norm, kind):
    backbone = build(name, "MODEL.TIMM.NORM", norm)
    for path, batch_norm in reference(name).named_modules():
        if isinstance(batch_norm, nn.BatchNorm2d):
            layer = backbone.get_submodule(f"body.{path}")
            assert isinstance(layer, kind) and layer.eps == batch_norm.eps
            assert getattr(layer, "momentum", batch_norm.momentum) == batch_norm.momentum
    keys = {key for key in reference(name).state_dict() if not key.endswith("num_batches_tracked")}
    if norm == "GN":
        keys = {key for key in keys if not key.endswith(("running_mean", "running_var"))}
    own = {key[len("body.") :] for key in backbone.state_dict() if not key.endswith("num_batches_tracked")}
    assert own == keys


@pytest.mark.slow
def test_group_norms_keep_their_activations():
    with_activation = build("efficientnet_lite0", "MODEL.TIMM.NORM", "GN").eval()
    first = with_activation.get_submodule("body.bn1")
    x = images(16, 16)[:, :1].repeat(1, 32, 1, 1)
    torch.testing.assert_close(first(x), F.relu6(F.group_norm(x, 32, first.weight, first.bias, first.eps)))


def test_layer_norms_stay():
    norms = [m for m in build("convnext_atto", "MODEL.TIMM.NORM", "GN").modules() if isinstance(m, nn.LayerNorm)]
    assert norms and [type(m) for m in reference("convnext_atto").modules() if isinstance(m, nn.LayerNorm)] == [
        type(m) for m in norms
    ]


# ------------------------------------------------------------------ distillation features

# By network: the activation that the outputs of res2 to res5 end in, and the channels of their last blocks' expansions.
PLAIN = (None, None, None, None)
DISTILLED = {
    "resnet18": ([F.relu] * 4, PLAIN),
    "resnet26d": ([F.relu] * 4, PLAIN),
    "regnety_002": ([F.relu] * 4, PLAIN),
    "mobilenetv1_100": ([F.relu6] * 4, PLAIN),
    "mobilenetv3_large_100": ([None, None, None, F.hardswish], (72, 120, 672, 960)),
    "mobilenetv4_conv_small": ([F.relu, F.relu, None, F.relu], (None, None, 384, 512)),
    # The only block of res2 expands its input before it halves the map.
    "mnasnet_small": ([None] * 4, (None, 96, 192, 528)),
    "tf_efficientnet_b0": ([None] * 4, (144, 240, 672, 1152)),
    "ghostnet_100": ([None] * 4, PLAIN),
    "rexnet_100": ([None] * 4, PLAIN),
    "cspnext_tiny": ([F.silu] * 4, PLAIN),
    "convnext_atto": ([None] * 4, PLAIN),
}
# Norm layers of res2 to res5 and of their expansions, below the stages' last modules.
NORMS = {
    "resnet18": ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"],
    "resnet26d": ["layer1.1.bn3", "layer2.1.bn3", "layer3.1.bn3", "layer4.1.bn3"],
    "regnety_002": [None, None, "s3.b4.conv3.bn", "s4.b7.conv3.bn"],  # one block: its shortcut has a norm layer too
    "mobilenetv1_100": ["blocks.1.1.bn2", "blocks.2.1.bn2", "blocks.3.5.bn2", "blocks.4.1.bn2"],
    "tf_efficientnet_b0": ["blocks.1.1.bn3", "blocks.2.1.bn3", "blocks.4.2.bn3", "blocks.6.0.bn3"],
    "ghostnet_100": [None] * 4,
    "convnext_atto": [None] * 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("name, norm", list(zip(DISTILLED, cycle(["BN", "FrozenBN"]))))
@torch.no_grad()
def test_distillation_features(name, norm):
    backbone = with_reference_weights(name, "MODEL.TIMM.NORM", norm)
    activations, expansions = DISTILLED[name]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    specs = distillation_features(backbone)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    expected = {f"{stage}.expansion" for stage, channels in zip(STAGES[1:], expansions) if channels}
    assert set(specs) == {*STAGES[1:], *expected}

    x = images(96, 160)
    plain = backbone(x)
    with FeatureHooks(backbone, specs).reading() as features:
        outputs = backbone(x)
    for i, (stage, activation) in enumerate(zip(STAGES[1:], activations)):
        assert torch.equal(outputs[stage], plain[stage])
        assert specs[stage].before_activation == (activation is not None)
        feature = features[stage] if activation is None else activation(features[stage])
        assert torch.equal(feature, outputs[stage])
        assert (features[stage] < 0).any()
        if name in NORMS:
            assert specs[stage].norm == (NORMS[name][i] and f"body.{NORMS[name][i]}")
        if expansions[i]:
            expansion, spec = features[f"{stage}.expansion"], specs[f"{stage}.expansion"]
            assert expansion.shape == (2, expansions[i], *outputs[stage].shape[2:]) and (expansion < 0).any()
            assert spec.before_activation
            # Nothing is added to an expansion: weight and bias of its norm layer are those of the feature.
            flat = copy.deepcopy(backbone)
            layer = flat.get_submodule(spec.norm)
            layer.weight.zero_()
            layer.bias.copy_(torch.arange(expansions[i]))
            with FeatureHooks(flat, {"expansion": spec}).reading() as biases:
                flat(x)
            assert torch.equal(biases["expansion"], layer.bias.reshape(-1, 1, 1).expand_as(expansion))


def test_initial_zeros_do_not_hide_the_norm_layer():
    # Residual branches start with a weight of zero at their end, so that each seems to be the one that adds nothing.
    backbone = build("regnety_002")
    assert not any(backbone.get_submodule(f"body.s4.b{i}.conv3.bn").weight.any() for i in range(1, 8))
    assert distillation_features(backbone)["res5"].norm == "body.s4.b7.conv3.bn"


# ------------------------------------------------------------------ ways to build and use it


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regnety_002", "tf_efficientnet_b0", "mobilenetv4_conv_small", "convnext_atto"])
@torch.no_grad()
def test_tracing_and_deep_copies(name):
    backbone = with_reference_weights(name, "MODEL.TIMM.NORM", "FrozenBN")
    x = images(64, 96)
    expected = backbone(x)
    traced = torch.jit.trace(backbone, (x,), strict=False, check_trace=False)
    for clone in (traced, copy.deepcopy(backbone)):
        for stage, output in clone(x).items():
            torch.testing.assert_close(output, expected[stage], rtol=1e-5, atol=1e-5)
    for stage, output in traced(images(128, 96)).items():
        torch.testing.assert_close(output, backbone(images(128, 96))[stage], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_keywords_and_lazy_config_build_what_the_cfg_builds():
    from_cfg = build("resnet18", "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.TIMM.OUT_FEATURES", STAGES[1:])
    arguments = {"name": "resnet18", "norm": "BN", "freeze_at": 2, "out_features": STAGES[1:]}
    for built in (TimmBackbone(**arguments), instantiate(LazyCall(TimmBackbone)(**arguments))):
        built.load_state_dict(from_cfg.state_dict())
        assert built.output_shape() == from_cfg.output_shape()
        trainable = [[p.requires_grad for p in net.parameters()] for net in (built, from_cfg)]
        assert trainable[0] == trainable[1]
        assert built.training


# ------------------------------------------------------------------ errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, texts",
    [
        ("resnet1", ["'resnet1'", "resnet18", "Did you mean"]),
        ("zzzzzzzz", ["'zzzzzzzz'", "timm.list_models()"]),
        ("", ["''", "timm.list_models()"]),
        ("resnet18.no_such_tag", ["'resnet18.no_such_tag'", "no_such_tag"]),
        ("test_vit", ["'test_vit'", "16", "4, 8, 16 and 32"]),
        ("visformer_tiny", ["8, 16, 32"]),
        ("efficientformerv2_s0", ["96 x 160"]),
        ("test_mambaout", ["stride 4", "(1, 24, 40, 16)"]),
        ("hrnet_w18_small", ["stride 4"]),
    ],
)
def test_networks_that_do_not_fit(name, texts):
    with pytest.raises(UserError) as error:
        build(name)
    for text in ["MODEL.TIMM.NAME", *texts]:
        assert text in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key, value, texts",
    [
        ("MODEL.TIMM.OUT_FEATURES", ["res2", "res6"], ["'res6'", "res5"]),
        ("MODEL.TIMM.OUT_FEATURES", [], ["[]", "res5"]),
        ("MODEL.TIMM.NORM", "BatchNorm", ["'BatchNorm'", "FrozenBN", "GN"]),
        ("MODEL.BACKBONE.FREEZE_AT", 6, ["6", "0", "5"]),
    ],
)
def test_wrong_values_name_the_key_and_the_candidates(key, value, texts):
    with pytest.raises(UserError) as error:
        build("resnet18", key, value)
    for text in [key, *texts]:
        assert text in str(error.value)


@pytest.mark.slow
def test_timm_is_not_needed_before_it_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # `import timm` raises an ImportError
    with pytest.raises(UserError, match="pip install timm"):
        build("resnet18")
    code = "import sys; sys.modules['timm'] = None; import mgd_det.modeling"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_a_trailing_identity_does_not_hide_the_activation():
    """Of repvgg_a0 res5 ends in the Identity `final_conv`."""
    backbone = TimmBackbone(name="repvgg_a0", norm="BN").eval()
    specs = backbone.distillation_features()
    assert all(spec.before_activation for spec in specs.values())
    with torch.no_grad(), FeatureHooks(backbone, specs).reading() as features:
        outputs = backbone(torch.randn(1, 3, 64, 64))
    for name, feature in features.items():
        assert (feature < 0).any()
        torch.testing.assert_close(feature.relu(), outputs[name])
