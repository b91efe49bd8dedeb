"""How the teacher computes: dtype, memory format, fused norms and compilation."""

import logging

import pytest
import torch
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from toy import randomize_norms

from mgd_det.distillation import PixelFormat, Teacher, TeacherNetwork, TeacherOptions, compilation
from mgd_det.errors import ArgumentError, UserError

RGB = PixelFormat("RGB", (120.0, 110.0, 100.0), (50.0, 60.0, 70.0))
BGR = PixelFormat("BGR", (110.0, 110.0, 120.0), (50.0, 50.0, 50.0))
FEATURES = ["res2", "res3"]


def group_norm(channels):
    return torch.nn.GroupNorm(4, channels)


def make(norm="FrozenBN", fpn=False, features=FEATURES, optimized=True, **options):
    torch.manual_seed(0)
    norm = group_norm if norm == "GN" else norm
    stages = [
        ResNet.make_stage(BasicBlock, 2, stride_per_block=[stride, 1], in_channels=8, out_channels=o, norm=norm)
        for stride, o in ((1, 8), (2, 12))
    ]
    network = ResNet(BasicStem(3, 8, norm=norm), stages, out_features=["res2", "res3"])
    network = FPN(network, ["res2", "res3"], 8) if fpn else network
    randomize_norms(network)
    teacher = Teacher(TeacherNetwork(network, BGR, options=TeacherOptions(**options)), features, RGB)
    if optimized:
        teacher.optimize(torch.device("cpu"))
    return teacher


def images(seed=1):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def plain(**options):
    return make(optimized=False, **options)(images())


def assert_near(features, expected, tolerance):
    """To within a part of each feature's largest value."""
    assert list(features) == list(expected)
    for name, feature in features.items():
        error = (feature.float() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize(
    "options, tolerance, dtype",
    [
        ({}, 5e-6, torch.float32),
        ({"channels_last": True}, 5e-6, torch.float32),
        ({"dtype": "float32"}, 5e-6, torch.float32),
        ({"dtype": "bfloat16"}, 0.05, torch.bfloat16),
        ({"dtype": "bfloat16", "fold_norm": False}, 0.05, torch.bfloat16),
        ({"dtype": "bfloat16", "channels_last": True}, 0.05, torch.bfloat16),
    ],
)
def test_features_stay_within_a_tolerance(norm, options, tolerance, dtype):
    teacher = make(norm, **options)
    for _ in range(2):
        teacher.optimize(torch.device("cpu"))  # a second time: nothing is fused again
        features = teacher(images(), [(32, 32), (20, 24)])
        expected = make(norm, fold_norm=False)(images(), [(32, 32), (20, 24)])
        assert_near(features, expected, tolerance)
        assert all(f.dtype == dtype and f.is_contiguous() and not f.requires_grad for f in features.values())


def test_half_precision_is_used():
    """Its rounding shows: otherwise the tolerance of the test above would hide a teacher in float32."""
    exact, half = plain(), make(dtype="bfloat16")(images())
    assert all((half[name].float() - exact[name]).abs().max() > 1e-3 for name in FEATURES)


def test_channels_last_reaches_the_convolutions():
    teacher, seen = make(channels_last=True), []
    teacher.backbone.res3[0].conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher(images())
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    assert teacher.backbone.res2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_the_norms_that_margins_come_from_are_kept_as_they_were(norm):
    trained = make(norm, optimized=False).backbone.res3[1].conv2.norm
    teacher = make(norm, dtype="bfloat16")
    kept = teacher.norm("res3")
    assert torch.equal(kept.weight, trained.weight) and torch.equal(kept.bias, trained.bias)
    assert kept.weight.dtype == torch.float32
    assert (teacher.backbone.res3[1].conv2.norm is None) == (norm == "FrozenBN")


def test_a_feature_without_a_norm_layer():
    teacher = make(norm="", features=["res2"])
    assert teacher.norm("res2") is None
    assert_near(teacher(images()), {"res2": plain(norm="")["res2"]}, 5e-6)


def test_unfolded_batch_norms_keep_float32():
    teacher = make(dtype="bfloat16", fold_norm=False)
    teacher(images())
    conv = teacher.backbone.res2[0].conv1
    assert conv.weight.dtype == torch.bfloat16
    assert {conv.norm.running_var.dtype, conv.norm.weight.dtype} == {torch.float32}


def test_before_it_is_optimized_it_computes_as_it_was_loaded():
    teacher = make(optimized=False, dtype="bfloat16", channels_last=True, compile=True)
    state = {name: value.clone() for name, value in teacher.backbone.state_dict().items()}
    assert_near(teacher(images()), plain(), 1e-9)
    assert all(torch.equal(value, state[name]) for name, value in teacher.backbone.state_dict().items())


# ------------------------------------------------------------------ whatever the student's precision
@pytest.mark.parametrize(
    "dtype, expected", [("auto", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_under_the_students_autocast(dtype, expected):
    with torch.autocast("cpu", torch.bfloat16):
        features = make(dtype=dtype)(images())
        # The student's precision is as it was.
        assert torch.nn.functional.conv2d(images(), torch.ones(1, 3, 1, 1)).dtype == torch.bfloat16
    assert {f.dtype for f in features.values()} == {expected}
    assert_near(features, plain(), 5e-6 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("dtype, expected", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_its_dtype_does_not_follow_the_students(dtype, expected):
    teacher = make(dtype=dtype)
    for fn in (torch.Tensor.double, torch.Tensor.half):
        teacher.apply(lambda tensor, fn=fn: fn(tensor) if tensor.is_floating_point() else tensor)
        features = teacher(images().double())
        assert {f.dtype for f in features.values()} == {expected}
    teacher.apply(lambda tensor: tensor.to("meta"))
    assert {p.device.type for p in teacher.backbone.parameters()} == {"meta"}


def test_the_outputs_for_the_heads_are_float32():
    features, outputs = make(fpn=True, features=["res2", "p3"], dtype="bfloat16").features_and_outputs(images())
    assert list(features) == ["res2", "p3"] and list(outputs) == ["p2", "p3"]
    assert features["p3"].dtype == torch.bfloat16 and outputs["p3"].dtype == torch.float32
    assert torch.equal(features["p3"].float(), outputs["p3"])


# ------------------------------------------------------------------ float16 and its largest value
def test_float16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="TEACHER.DTYPE is 'float16', .* CPU .* use 'bfloat16'"):
        make(dtype="float16")


def test_a_value_beyond_float16_is_named():
    teacher = make(optimized=False, dtype="float16")  # which a CPU refuses; autocast stands in
    for parameter in teacher.backbone.res3[1].conv2.parameters():
        parameter.data *= 1e5
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(
            UserError, match="the teacher's res3 overflows float16, .* 65504: set .*DTYPE to 'bfloat16'"
        ):
            teacher(images())
    features = teacher(images())  # in float32
    assert all(f.isfinite().all() for f in features.values()) and features["res3"].abs().max() > 65504


@pytest.mark.parametrize("value", [1e5, -1e5])
def test_a_float16_feature_with_an_infinity_has_a_nan_in_each_channel(value):
    """-inf alone would be below every margin, and leave a loss finite."""
    teacher = make()
    teacher.backbone.res3[1].conv2.bias.data[5] = value  # the folded norm's
    with torch.autocast("cpu", torch.float16):
        features = teacher(images())
    assert features["res3"].dtype == torch.float16 and features["res3"].isinf().any()
    assert features["res3"].isnan().any(3).any(2).all() and features["res2"].isfinite().all()
    assert not teacher(images())["res3"].isnan().any()  # in float32


def test_an_infinite_value_of_float32_is_not_called_an_overflow_of_float16():
    teacher = make()
    teacher.backbone.res3[1].conv2.weight.data.fill_(float("inf"))
    assert not teacher(images())["res3"].isfinite().all()  # the training step refuses the loss


# ------------------------------------------------------------------ compilation
def test_what_is_compiled_and_when(monkeypatch):
    compiled = []
    monkeypatch.setattr(compilation, "_problem", lambda device: "")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    teacher = make(optimized=False, compile=True)
    teacher(images())
    assert compiled == []
    teacher.optimize(torch.device("cpu"))
    teacher(images())
    backbone = teacher.backbone
    # All but the blocks whose activation is read.
    assert [module for module, _ in compiled] == [backbone.stem, backbone.res2[0], backbone.res3[0]]
    assert all(options == {"dynamic": True} for _, options in compiled)


def test_without_a_compiler_it_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(compilation, "_problem", lambda device: "no C++ compiler")
    with caplog.at_level(logging.WARNING):
        assert_near(make(compile=True)(images()), plain(), 5e-6)
    assert "MODEL.MGD.TEACHER.COMPILE is on, but" in caplog.text


# ------------------------------------------------------------------ wrong values
@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "fp16"}, "dtype is 'fp16'; use one of auto, float32, bfloat16, float16"),
        ({"channels_last": "yes"}, "channels_last is 'yes'; use one of True, False"),
        ({"compile": 1}, "compile is 1"),
        ({"fold_norm": None}, "fold_norm is None"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ArgumentError, match=message):
        TeacherOptions(**options)
