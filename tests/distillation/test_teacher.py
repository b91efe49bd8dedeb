"""The frozen teacher."""

import copy

import pytest
import torch
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from torch import nn

from mgd_det.distillation import PixelFormat, Teacher, TeacherNetwork, TeacherOptions
from mgd_det.errors import UserError

RGB = PixelFormat("RGB", (120.0, 110.0, 100.0), (50.0, 60.0, 70.0))
BGR = PixelFormat("BGR", (100.0, 110.0, 120.0), (1.0, 1.0, 1.0))


def resnet():
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(BasicBlock, 1, stride_per_block=[stride], in_channels=i, out_channels=o, norm="BN")
        for i, o, stride in ((8, 8, 1), (8, 12, 2), (12, 16, 2))
    ]
    return ResNet(BasicStem(3, 8, norm="BN"), stages, out_features=["res2", "res3", "res4"])


def teacher_of(network, features, pixels=RGB, unset=(), **options):
    return Teacher(TeacherNetwork(network, pixels, unset, TeacherOptions(**options)), features, RGB)


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_reads_the_features_chosen_of_its_own_normalisation():
    network = resnet()
    teacher = teacher_of(network, ["res3", "res2"], BGR)
    x = images()
    features = teacher(x, [(32, 32), (20, 24)])
    pixels = x * torch.tensor(RGB.std).view(1, 3, 1, 1) + torch.tensor(RGB.mean).view(1, 3, 1, 1)
    own = pixels.flip(1) - torch.tensor(BGR.mean).view(1, 3, 1, 1)
    own[1, :, 20:], own[1, :, :, 24:] = 0, 0
    with torch.no_grad():
        outputs = network.eval()(own)
    assert set(features) == {"res2", "res3"}
    for name, feature in features.items():
        torch.testing.assert_close(feature.clamp(min=0), outputs[name], atol=1e-4, rtol=1e-4)
        assert feature.min() < 0


def test_runs_no_deeper_than_it_must():
    teacher = teacher_of(resnet(), ["res2"])
    calls = []
    teacher.backbone.res2.register_forward_pre_hook(lambda *_: calls.append("res2"))
    teacher.backbone.res3.register_forward_pre_hook(lambda *_: calls.append("res3"))
    teacher.backbone.res3[0].register_forward_pre_hook(lambda *_: calls.append("res3.0"))
    teacher(images())
    assert calls == ["res2"]


def test_is_frozen_in_eval_mode_and_beyond_the_reach_of_train():
    teacher = teacher_of(resnet().train(), ["res2", "res4"])
    owner = nn.Module()
    owner.teacher = teacher
    owner.train()
    assert list(owner.parameters()) == [] and owner.state_dict() == {}
    assert not any(module.training for module in teacher.backbone.modules())
    assert not any(p.requires_grad for p in teacher.backbone.parameters())
    statistics = [b.clone() for b in teacher.backbone.buffers()]
    x = images().requires_grad_()
    features = teacher(x)
    assert not any(f.requires_grad or f.is_inference() for f in features.values())
    assert all(torch.equal(a, b) for a, b in zip(statistics, teacher.backbone.buffers()))


def fpn():
    torch.manual_seed(0)
    return FPN(resnet(), ["res2", "res3", "res4"], 8)


def test_of_an_fpn_no_more_runs_than_the_features_need():
    network, calls = fpn(), []
    for name in ("bottom_up.res3", "bottom_up.res4", "fpn_lateral4", "fpn_output4", "fpn_output3", "fpn_output2"):
        module = network.get_submodule(name)
        # A stage's blocks are run one by one.
        (module[0] if name.startswith("bottom_up") else module).register_forward_hook(
            lambda *_, n=name: calls.append(n)
        )
    for features, ran in (
        (["res2"], []),
        (["res3"], ["bottom_up.res3"]),
        (["res3", "p4"], ["bottom_up.res3", "bottom_up.res4", "fpn_lateral4", "fpn_output4"]),
    ):
        teacher = teacher_of(network, features)
        calls.clear()
        assert list(teacher(images())) == features
        assert calls == ran


def test_features_and_outputs_come_of_one_forward():
    network, calls = fpn().eval(), []
    with torch.no_grad():
        expected = network(images())
    network.bottom_up.stem.register_forward_hook(lambda *_: calls.append("stem"))
    teacher = teacher_of(network, ["p3"])
    features, outputs = teacher.features_and_outputs(images())
    assert calls == ["stem"] and list(outputs) == list(expected)
    assert torch.equal(features["p3"], expected["p3"])
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "unset, features, refused",
    [
        ("backbone.bottom_up.res4.0.conv1.weight", ["res2"], True),
        ("backbone.fpn_output3.weight", ["res2"], False),
        ("backbone.fpn_output3.weight", ["res2", "p4"], True),
        ("head.cls_score.weight", ["p4"], False),
    ],
)
def test_what_runs_must_have_weights(unset, features, refused):
    if not refused:
        teacher_of(fpn(), features, unset=[unset])
        return
    with pytest.raises(UserError, match=f"leave 1 of its tensors.*{unset}.*ALLOW_UNSET"):
        teacher_of(fpn(), features, unset=[unset])


def test_of_a_detector_every_weight_must_be_there():
    detector = torch.nn.Module()
    detector.backbone = fpn()
    with pytest.raises(UserError, match="head.cls_score.weight"):
        teacher_of(detector, ["res2"], unset=["head.cls_score.weight"])


def test_apply_reaches_parameters_and_buffers():
    teacher = teacher_of(resnet(), ["res2"])
    teacher.apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert {p.dtype for p in teacher.backbone.parameters()} == {torch.float64}
    assert teacher.backbone.stem.conv1.norm.running_mean.dtype == torch.float64


def test_a_feature_that_it_lacks():
    with pytest.raises(KeyError, match="res9"):
        teacher_of(resnet(), ["res9"])


def test_a_deep_copy_shares_the_network_until_one_changes():
    teacher = teacher_of(resnet(), ["res2"])
    expected = teacher(images())["res2"]
    twin = copy.deepcopy(teacher)
    twin.apply(lambda tensor: tensor.to("cpu"))  # changes nothing
    assert twin.backbone is teacher.backbone
    twin.apply(torch.Tensor.double)
    assert twin.backbone is not teacher.backbone
    assert torch.equal(teacher(images())["res2"], expected)
    torch.testing.assert_close(twin(images().double())["res2"], expected.double(), atol=1e-4, rtol=1e-4)
