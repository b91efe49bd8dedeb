"""What a config says about positions and the teacher of a distilled backbone."""

import pytest
import torch
import toy
from detectron2.modeling import build_model
from injecting import POSITIONS, losses_of, match
from toy import RCNN, RETINANET

from mgd_det.errors import UserError
from mgd_det.modeling import distilled_backbone


@pytest.mark.slow
def test_expansions_are_positions_of_mobilenet(teachers):
    opts = ["MODEL.MGD.POSITIONS", "['res3.expansion=res3', 'res4.expansion=res4']"]
    detector = build_model(toy.distilled_config(teachers[RETINANET], student="mobilenetv2", opts=opts))
    match(detector)
    positions = detector.backbone.mgd.distiller.positions
    assert [(p.student_channels, p.teacher_channels) for p in positions] == [(192, 256), (576, 512)]
    losses = losses_of(detector)
    assert {"loss_mgd_res3_expansion", "loss_mgd_res4_expansion"} <= set(losses)


def test_a_frozen_position_is_warned_of(cfg, caplog):
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    build_model(cfg)
    assert "res2 is frozen" in caplog.text and "res3 is frozen" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.MGD.POSITIONS", "['res7']"], r"MODEL.MGD.POSITIONS .*'res7'.*It has: res2, res3, res4, res5"),
        (["MODEL.MGD.POSITIONS", "['res2=p2']"], r"teacher .*'p2'.*It has: res2"),
        (["MODEL.MGD.POSITIONS", "['res2=res3']"], r"'res2' is 16 x 16 .* 'res3' is 8 x 8"),
        (["MODEL.MGD.TEACHER.CONFIG_FILE", "COCO-Detection/retinanet_R_5_FPN_1x.yaml"], "Did you mean .*R_50_FPN_1x"),
        (["MODEL.MGD.TEACHER.CONFIG_FILE", ""], "TEACHER.CONFIG_FILE is empty"),
        (["MODEL.MGD.TEACHER.WEIGHTS", ""], "TEACHER.WEIGHTS is empty"),
        (["MODEL.MGD.TEACHER.WEIGHTS", "nowhere.pth"], "nowhere.pth: there is no such file"),
        (["MODEL.MGD.TEACHER.OPTS", "['MODEL.NONE', 1]"], "of MODEL.MGD.TEACHER with .*MODEL.NONE"),
        (
            ["MODEL.MGD.STUDENT_BACKBONE", "build_resnet_fpn"],
            "STUDENT_BACKBONE is 'build_resnet_fpn'; use one of build_",
        ),
        (["MODEL.MGD.STUDENT_BACKBONE", "build_mgd_backbone"], "STUDENT_BACKBONE is 'build_mgd_backbone'"),
        (["MODEL.MGD.REDUCER", "max"], "MODEL.MGD.REDUCER is 'max'; use one of amp, rd, sm"),
        (["MODEL.MGD.MARGIN", "zero"], "MODEL.MGD.MARGIN is 'zero'"),
        (["MODEL.MGD.NORM", "XN"], "MODEL.MGD.NORM is 'XN'"),
        (["MODEL.MGD.LOSS.PARTIAL_L2.SCALE", "sum"], "MODEL.MGD.LOSS.PARTIAL_L2.SCALE is 'sum'"),
        (["MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "[1.0, 2.0]"], "give one number >= 0, or 4"),
        (["MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "[-1.0]"], "LOSS.PARTIAL_L2.WEIGHTS"),
        (["MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "[0.0]"], "MODEL.MGD.LOSS.NAMES has no loss with a weight above 0"),
        (["MODEL.MGD.LOSS.NAMES", "[]"], "MODEL.MGD.LOSS.NAMES has no loss with a weight above 0"),
        (["MODEL.MGD.LOSS.NAMES", "['pkd', 'pkd']"], "names 'pkd' more than once"),
        (["MODEL.MGD.LOSS.NAMES", "['kl']"], "LOSS.NAMES is 'kl'; use one of partial_l2, l2, cwd, pkd, at"),
    ],
)
def test_what_the_config_gets_wrong_is_named(cfg, opts, message):
    cfg.merge_from_list(opts)
    with pytest.raises(UserError, match=message):
        build_model(cfg)


def test_partial_weights_of_a_teacher_are_an_error(cfg, teachers, tmp_path):
    state = torch.load(teachers[RETINANET])["model"]
    state.pop("backbone.bottom_up.res4.0.conv2.weight")
    state["backbone.bottom_up.res2.0.conv1.weight"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "partial.pth")
    cfg.MODEL.MGD.TEACHER.WEIGHTS = str(tmp_path / "partial.pth")
    with pytest.raises(UserError, match="leave 2 of its tensors at their initial value .*res4.0.conv2.weight"):
        build_model(cfg)
    cfg.MODEL.MGD.TEACHER.ALLOW_UNSET = ["backbone.bottom_up.res4.0.conv2", "backbone.bottom_up.res2.0"]
    build_model(cfg)


@pytest.mark.slow
def test_a_teacher_of_imagenet_weights_alone_is_an_error(cfg, teachers, tmp_path):
    """A teacher's config names what its own training began with: forgotten WEIGHTS would go unseen."""
    state = torch.load(teachers[RETINANET])["model"]
    state = {key: value for key, value in state.items() if key.startswith("backbone.bottom_up.")}
    torch.save({"model": state}, tmp_path / "classifier.pth")
    cfg.MODEL.MGD.TEACHER.WEIGHTS = str(tmp_path / "classifier.pth")
    with pytest.raises(UserError, match="classifier.pth have no tensor of its FPN"):
        build_model(cfg)
    cfg.MODEL.MGD.TEACHER.ALLOW_UNSET = ["backbone."]
    build_model(cfg)


def test_a_teacher_without_a_config(cfg, teachers):
    """As LazyConfig builds it: by keyword arguments alone."""
    from mgd_det.distillation import PixelFormat
    from mgd_det.modeling import pretrained_teacher

    pixels = PixelFormat("BGR", (103.53, 116.28, 123.675), (57.0, 57.0, 57.0))
    heavy, light = build_model(toy.teacher_config()).backbone, build_model(toy.plain_config()).backbone
    teacher = pretrained_teacher(heavy, teachers[RETINANET], pixels)
    backbone = distilled_backbone(student=light, teacher=teacher, pixels=pixels)
    assert backbone is light
    assert [p.name for p in backbone.mgd.distiller.positions] == list(POSITIONS)
    expected = torch.load(teachers[RETINANET])["model"]["backbone.bottom_up.res5.2.conv3.weight"]
    assert torch.equal(teacher.backbone.bottom_up.res5[2].conv3.weight, expected)
    with pytest.raises(UserError, match="there is no such file"):
        pretrained_teacher(heavy, "nowhere.pth", pixels)


@pytest.mark.slow
def test_a_teacher_of_another_detector_serves(cfg, teachers):
    """Only the backbones meet: a Mask R-CNN teaches a RetinaNet."""
    cfg.MODEL.MGD.TEACHER.CONFIG_FILE, cfg.MODEL.MGD.TEACHER.WEIGHTS = RCNN, teachers[RCNN]
    cfg.MODEL.MGD.TEACHER.OPTS = toy.teacher_opts(RCNN)
    detector = build_model(cfg)
    match(detector)
    assert losses_of(detector)["loss_mgd_res5"] > 0
