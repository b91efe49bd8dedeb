"""Heads that cannot be compared, and wrong options: one message that names the key."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from toy import FCOS, RCNN, RETINANET

from mgd_det.cli import benchmark
from mgd_det.config import head_loss_keys, plain_student_config
from mgd_det.distillation import PixelFormat
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import attach_losses, distilled_backbone, pretrained_teacher
from mgd_det.modeling.head_distillation import HeadDistillation
from mgd_det.modeling.head_distillation.cross_heads import _width
from mgd_det.modeling.light.separable_conv import SeparableConv2d
from mgd_det.modeling.mgd_backbone import arguments_from_config, config_key

ON = {"weight": 1.0}
SEVEN = ("MODEL.RETINANET.NUM_CLASSES", "7", "MODEL.ROI_HEADS.NUM_CLASSES", "7")
NO_MASKS = ("MODEL.MASK_ON", "False")
CASCADE = tuple(toy.DETECTORS["cascade_mask_rcnn"][1])
CONVS = ("MODEL.RETINANET.NUM_CONVS", "3")
WIDE = ("MODEL.FPN.OUT_CHANNELS", "24")
SIGMOID = ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True")
SIDE = ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "7")


@functools.lru_cache(maxsize=2)
def detector(base, *opts):
    return build_model(toy.plain_config(base, opts=opts))


def attach(student, teacher, **options):
    HeadDistillation(SimpleNamespace(detector=teacher), **options).attach(student, lambda: None)


@pytest.mark.parametrize(
    "loss, student, message",
    [
        ("boxes", (RETINANET, *SEVEN), "the student has 7 classes and the teacher 10"),
        ("cross_kd", (RETINANET, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 1.0]]"), "different anchors"),
        ("boxes", (FCOS,), "the student is a FCOS and the teacher a RetinaNet"),
        ("cross_kd", (RCNN,), "the student is a GeneralizedRCNN and the teacher a RetinaNet"),
    ],
)
def test_dense_detectors_that_differ(loss, student, message):
    with pytest.raises(UserError, match=f"MODEL.MGD.{loss.upper()}.WEIGHT is > 0.*{message}"):
        attach(detector(*student), detector(RETINANET), **{loss: ON})


def test_anchors_of_the_same_size_at_another_stride():
    opts = ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32]]", "MODEL.RETINANET.IN_FEATURES")
    with pytest.raises(UserError, match="MODEL.MGD.BOXES.WEIGHT is > 0.*different anchors"):
        attach(detector(RETINANET, *opts, "['p4', 'p5']"), detector(RETINANET, *opts, "['p3', 'p4']"), boxes=ON)


@pytest.mark.parametrize(
    "student, options, message",
    [
        ((RCNN, *SEVEN), {"boxes": ON}, "MODEL.MGD.BOXES.WEIGHT is > 0.*student has 7 classes and the teacher 10"),
        ((RCNN, *SEVEN), {"masks": ON}, "MODEL.MGD.MASKS.WEIGHT is > 0.*student has 7 classes and the teacher 10"),
        ((RCNN, *CASCADE), {"boxes": ON}, "student is a CascadeROIHeads and the teacher a StandardROIHeads"),
        ((RCNN, *NO_MASKS), {"masks": ON}, "MODEL.MGD.MASKS.WEIGHT is > 0, but the student has no mask head"),
        ((RCNN, *SIDE), {"masks": ON}, "student's MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is 7 and the teacher's 14"),
        ((RCNN, *SIGMOID), {"boxes": ON}, "BOXES.WEIGHT is > 0.*MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"),
        ((RETINANET,), {"masks": ON, "boxes": ON}, "BOXES.WEIGHT and MODEL.MGD.MASKS.WEIGHT are > 0.*a RetinaNet"),
    ],
)
def test_rcnns_that_differ(student, options, message):
    with pytest.raises(UserError, match=message):
        attach(detector(*student), detector(RCNN), **options)


def test_masks_of_a_cascade_and_a_plain_rcnn_can_be_compared():
    attach(detector(RCNN, *CASCADE), detector(RCNN), masks=ON)


@pytest.mark.parametrize(
    "student, teacher, layer, message",
    [
        (WIDE, (), -1, "behind 0 convolutions the student's head has 24 channels and the teacher's 16"),
        (WIDE, (), 1, "behind 1 convolutions the student's head has 24 channels and the teacher's 16"),
        ((), CONVS, -1, "LAYER is -1, here 2 .*the student's head has 1 and the teacher's 3"),
        (CONVS, (), 2, "LAYER is 2, here 2 .*the student's head has 3 and the teacher's 1"),
    ],
)
def test_heads_that_cannot_be_crossed(student, teacher, layer, message):
    options = {"weight": 1.0, "layer": layer}
    # RetinaNet's head is as wide as its FPN.
    with pytest.raises(UserError, match=f"MODEL.MGD.CROSS_KD.WEIGHT is > 0.*{message}"):
        attach(detector(RETINANET, *student), detector(RETINANET, *teacher), cross_kd=options)


def test_a_separable_convolution_is_as_wide_as_its_outputs():
    head, expected = copy.deepcopy(detector(RETINANET).head), 16
    student = copy.deepcopy(detector(RETINANET, *WIDE))
    assert _width(head.cls_subnet, 1) == expected
    head.cls_subnet[0] = SeparableConv2d(expected, 8, 3, padding=1)
    assert _width(head.cls_subnet, 1) == 8 and _width(student.head.cls_subnet, 0) == 24


def test_a_head_of_another_form_cannot_be_crossed():
    student = copy.deepcopy(detector(RETINANET))
    student.head = torch.nn.Identity()
    with pytest.raises(UserError, match="MODEL.MGD.CROSS_KD.WEIGHT is > 0.*a Identity, has no towers"):
        attach(student, detector(RETINANET), cross_kd=ON)


@pytest.mark.parametrize(
    "teacher, options, message",
    [
        (RETINANET, {"masks": ON}, "masks.weight is 1.0, but the teacher, a RetinaNet, predicts no masks"),
        (RCNN, {"cross_kd": ON}, "cross_kd.weight is 1.0, but the teacher, a GeneralizedRCNN"),
        (None, {"boxes": ON}, "boxes.weight is 1.0, but the teacher, a backbone alone"),
        (RETINANET, {"boxes": {"weight": -1.0}}, "boxes.weight is -1.0"),
        (RETINANET, {"boxes": {"wieght": 1.0}}, "boxes.wieght is unknown.*weight, decay"),
        (RETINANET, {"cross_kd": {"layer": 1}}, "cross_kd.weight is None"),
        (RETINANET, {"boxes": {"weight": 1.0, "decay": "fast"}}, "boxes.decay is 'fast'"),
        (RCNN, {"masks": {"weight": float("nan")}}, "masks.weight is nan"),
        (RETINANET, {"cross_kd": {"weight": 1.0, "box_weight": -1.0}}, "cross_kd.box_weight is -1.0"),
        (RETINANET, {"cross_kd": {"weight": 1.0, "layer": -2}}, "cross_kd.layer is -2"),
        (RETINANET, {"cross_kd": {"weight": 1.0, "layer": 1.5}}, "cross_kd.layer is 1.5"),
    ],
)
def test_wrong_options(teacher, options, message):
    with pytest.raises(ArgumentError, match=message):
        HeadDistillation(SimpleNamespace(detector=teacher and detector(teacher)), **options)


def test_keys_and_arguments_of_a_config(tmp_path):
    weights = toy.save_teacher(tmp_path / "teacher.pth")
    cfg = toy.distilled_config(weights, opts=["MODEL.MGD.POSITIONS", "['p3']"])
    assert head_loss_keys(cfg) == []
    shape = SimpleNamespace(channels=3)
    arguments = arguments_from_config(cfg, shape)
    assert [arguments[name] for name in ("logits", "boxes", "masks", "cross_kd")] == [None] * 4
    assert arguments["teacher"].detector is None  # off: the teacher's heads are not even built
    cfg.merge_from_list(["MODEL.MGD.BOXES.WEIGHT", 0.5, "MODEL.MGD.CROSS_KD.WEIGHT", 2.0])
    assert head_loss_keys(cfg) == ["MODEL.MGD.BOXES.WEIGHT", "MODEL.MGD.CROSS_KD.WEIGHT"]
    arguments = arguments_from_config(cfg, shape)
    assert arguments["teacher"].detector is not None
    assert arguments["boxes"] == {"weight": 0.5, "decay": "constant"}
    assert arguments["cross_kd"] == {"weight": 2.0, "decay": "constant", "box_weight": 1.0, "layer": -1}
    assert config_key("cross_kd.box_weight") == "MODEL.MGD.CROSS_KD.BOX_WEIGHT"
    assert "MGD" not in plain_student_config(cfg).MODEL
    with pytest.raises(UserError, match="MODEL.MGD.BOXES.WEIGHT is not 0"):
        benchmark._check_config(cfg, "a.yaml")


def test_a_teacher_without_heads_is_refused(tmp_path):
    cfg = toy.plain_config()
    pixels = PixelFormat.from_config(cfg)
    weights = toy.save_teacher(tmp_path / "teacher.pth")
    teacher = pretrained_teacher(build_model(toy.teacher_config()).backbone, weights, pixels)
    with pytest.raises(ArgumentError, match="cross_kd.weight is 1.0, but the teacher, a backbone alone"):
        distilled_backbone(student=build_model(cfg).backbone, teacher=teacher, pixels=pixels, cross_kd=ON)


@pytest.mark.slow
def test_a_weight_of_zero_needs_no_heads_of_the_teacher(tmp_path):
    """As an override of a LazyConfig turns a loss off, like MODEL.MGD.BOXES.WEIGHT 0 of a yaml config."""
    cfg = toy.plain_config()
    pixels = PixelFormat.from_config(cfg)
    weights = toy.save_teacher(tmp_path / "teacher.pth")
    teacher = pretrained_teacher(build_model(toy.teacher_config()).backbone, weights, pixels)
    options = {"teacher": teacher, "pixels": pixels, "boxes": {"weight": 0}, "logits": {"weight": 0.0}}
    student = build_model(cfg)
    student.backbone = distilled_backbone(student=student.backbone, **options, losses={"at": {}})
    attach_losses(student)
    with EventStorage():
        losses = student.train()(toy.batch())
    assert "loss_at_res3" in losses and not any(name.startswith("loss_kd_") for name in losses)
    nothing = {"losses": {"at": {"weights": 0}}}
    with pytest.raises(ArgumentError, match="losses has no loss with a weight above 0"):
        distilled_backbone(student=build_model(cfg).backbone, **options, **nothing)
    with pytest.raises(ArgumentError, match="boxes.weight is False"):
        distilled_backbone(student=build_model(cfg).backbone, **{**options, "boxes": {"weight": False}}, losses={})
