import importlib.util

import pytest

from mgd_det.checkpoint.sources import TORCHVISION_NETWORKS
from mgd_det.errors import UserError
from mgd_det.recipe import STUDENTS, find_student


@pytest.mark.parametrize(
    "name, found",
    [
        ("mobilenetv2", "mobilenetv2"),
        ("MobileNetV2", "mobilenetv2"),
        ("mobilenet_v2", "mobilenetv2"),
        ("build_mobilenetv2_backbone", "mobilenetv2"),
        ("build_mobilenetv2_fpn_backbone", "mobilenetv2"),
        ("build_retinanet_mobilenetv2_fpn_backbone", "mobilenetv2"),
        ("build_fcos_mobilenetv3_small_fpn_backbone", "mobilenetv3_small"),
        ("MobileNetV3L", "mobilenetv3_large"),
        ("mobilenetv1", "mobilenetv1"),
        ("R18", "resnet18"),
        ("R_50", "resnet50"),
        ("ResNet-34", "resnet34"),
        ("build_resnet_fpn_backbone", "resnet18"),
        ("shufflenetv2", "shufflenetv2_x1.0"),
        ("ShuffleNetV2_x0.5", "shufflenetv2_x0.5"),
    ],
)
def test_short_names_builders_and_spellings(name, found):
    assert find_student(name) is STUDENTS[found]


def test_every_student_is_found_by_its_own_name():
    for name, student in STUDENTS.items():
        assert find_student(name) is student
        assert find_student(name.upper()) is student


def test_the_weights_are_named_as_torchvision_names_them():
    named = {student.weights.partition("torchvision://")[2] for student in STUDENTS.values()} - {""}
    assert named == set(TORCHVISION_NETWORKS)


@pytest.mark.parametrize("name, close", [("mobilnetv2", "mobilenetv2"), ("resnet8", "resnet18"), ("", "")])
def test_an_unknown_student(name, close):
    with pytest.raises(UserError) as error:
        find_student(name)
    assert "--student" in str(error.value) and repr(name) in str(error.value)
    assert (f"Did you mean {close}" in str(error.value)) == bool(close)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_models_of_timm():
    student = find_student("timm:mobilenetv4_conv_small")
    assert student.keys == {"MODEL.TIMM.NAME": "mobilenetv4_conv_small"} and student.network == "timm"
    assert student.weights == "timm://mobilenetv4_conv_small"
    # This one was trained on [-1, 1], as the table of docs/students.md says of MobileNetV1.
    old = find_student("timm://mobilenetv1_100")
    assert (old.pixel_mean, old.pixel_std) == (STUDENTS["mobilenetv1"].pixel_mean, STUDENTS["mobilenetv1"].pixel_std)
    with pytest.raises(UserError, match="mobilenetv4_conv_smal.*Did you mean mobilenetv4_conv_small"):
        find_student("timm:mobilenetv4_conv_smal")
