"""Distillation of logits: which logits meet, in each kind of detector, and which detectors have none in common."""

import numpy as np
import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from toy import FCOS, RCNN, RETINANET

from mgd_det.config import without_distillation
from mgd_det.distillation import PixelFormat, sigmoid_logit_loss, softmax_logit_loss
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import attach_losses, distilled_backbone, evaluating, find_distillation, pretrained_teacher

LOGITS = ["MODEL.MGD.LOGITS.WEIGHT", "2.0", "MODEL.MGD.LOGITS.TEMPERATURE", "1.5", "MODEL.MGD.LOSS.NAMES", "['at']"]
CASCADE = toy.DETECTORS["cascade_mask_rcnn"][1]


def config(tmp_path, base, opts=()):
    """A student R18 and a teacher narrow R50 of the same detector, and the teacher alone, with its weights."""
    torch.manual_seed(7)
    teacher = build_model(toy.teacher_config(base, opts=opts)).eval()
    toy.randomize_norms(teacher)
    for name, parameter in teacher.named_parameters():
        if "cls_score" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)  # as if it had learned something
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    cfg = toy.distilled_config(str(tmp_path / "teacher.pth"), base, opts=[*LOGITS, *opts])
    cfg.MODEL.MGD.TEACHER.OPTS = [*cfg.MODEL.MGD.TEACHER.OPTS, *opts]
    return cfg, teacher


def losses_of(detector):
    attach_losses(detector)
    with EventStorage():
        return detector.train()(toy.batch())


def recorded(module, calls):
    """Keeps (arguments, result) of each call of a module."""
    module.register_forward_hook(lambda _, args, output: calls.append((args, output)))


def teacher_features(teacher):
    images = teacher.preprocess_image(toy.batch())
    return teacher.backbone(images.tensor)


@pytest.mark.slow
@pytest.mark.parametrize("base", [RETINANET, FCOS])
def test_every_anchor_of_a_dense_detector(tmp_path, base):
    cfg, teacher = config(tmp_path, base)
    detector, calls = build_model(cfg), []
    recorded(detector.head, calls)
    losses = losses_of(detector)
    with torch.no_grad():
        features = teacher_features(teacher)
        theirs = teacher.head([features[name] for name in ("p3", "p4", "p5", "p6", "p7")])[0]
    ours = calls[0][1][0]
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    flat = [torch.cat([x.reshape(-1) for x in logits]) for logits in (ours, theirs)]
    expected = 2 * sigmoid_logit_loss(*flat, 1.5, 2.0)
    assert expected > 0.01
    assert losses["loss_kd_logits"].item() == pytest.approx(expected.item(), rel=1e-4)
    losses["loss_kd_logits"].backward()
    assert detector.head.cls_score.weight.grad.abs().sum() > 0
    assert detector.backbone.bottom_up.res2[0].conv1.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("opts", [(), CASCADE])
def test_the_students_own_proposals_of_an_rcnn(tmp_path, opts):
    cfg, teacher = config(tmp_path, RCNN, opts)
    detector, pooled, predicted = build_model(cfg), [], []
    heads = detector.roi_heads
    recorded(heads.box_pooler, pooled)
    for predictor in heads.box_predictor if opts else [heads.box_predictor]:
        recorded(predictor, predicted)
    losses = losses_of(detector)
    stages = 3 if opts else 1
    assert len(pooled) == len(predicted) == stages
    expected = []
    with torch.no_grad():
        features = teacher_features(teacher)
        levels = [features[name] for name in ("p2", "p3", "p4", "p5")]
        for stage in range(stages):
            head, predictor = teacher.roi_heads.box_head, teacher.roi_heads.box_predictor
            if opts:
                head, predictor = head[stage], predictor[stage]
            boxes = pooled[stage][0][1]
            theirs = predictor(head(teacher.roi_heads.box_pooler(levels, boxes)))[0]
            expected.append(2 * softmax_logit_loss(predicted[stage][1][0], theirs, 1.5).item())
    assert min(expected) > 1e-4
    assert losses["loss_kd_logits"].item() == pytest.approx(np.sum(expected), rel=1e-4)
    losses["loss_kd_logits"].backward()
    assert heads.box_pooler is not None and detector.backbone.bottom_up.res2[0].conv1.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_teacher_runs_once_and_the_checkpoint_is_the_plain_students(tmp_path):
    cfg, _ = config(tmp_path, RETINANET)
    detector, calls = build_model(cfg), []
    backbone = find_distillation(detector)
    backbone.teacher.backbone.bottom_up.stem.register_forward_hook(lambda *_: calls.append("stem"))
    backbone.teacher.detector.head.register_forward_hook(lambda *_: calls.append("head"))
    losses_of(detector)
    assert calls == ["stem", "head"]
    assert not any(p.requires_grad for p in backbone.teacher.detector.parameters())
    assert list(detector.state_dict()) == list(build_model(without_distillation(cfg)).state_dict())
    with evaluating(detector), torch.no_grad():
        detector(toy.batch())
    assert calls == ["stem", "head"]


@pytest.mark.slow
def test_a_forward_that_raised_leaves_nothing_behind(tmp_path):
    cfg, _ = config(tmp_path, RCNN)
    detector = build_model(cfg)
    torch.manual_seed(0)
    first = losses_of(detector)["loss_kd_logits"].item()
    detector.eval()(toy.batch())
    mask_forward, detector.roi_heads.mask_head.forward = detector.roi_heads.mask_head.forward, None
    with pytest.raises(TypeError):
        losses_of(detector)
    detector.roi_heads.mask_head.forward = mask_forward
    torch.manual_seed(0)
    assert losses_of(detector)["loss_kd_logits"].item() == pytest.approx(first, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.MGD.LOGITS.WEIGHT", "-1.0"], "LOGITS.WEIGHT is -1.0"),
        (["MODEL.MGD.LOGITS.TEMPERATURE", "0.0"], "LOGITS.TEMPERATURE is 0.0"),
        (["MODEL.MGD.LOGITS.FOCAL_GAMMA", "-2.0"], "LOGITS.FOCAL_GAMMA is -2.0"),
        (["MODEL.RETINANET.NUM_CLASSES", "7"], "the student has 7 classes and the teacher 10"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 1.0]]"], "different anchors"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64], [128]]"], "different anchors"),
        (["MODEL.META_ARCHITECTURE", "FCOS"], "the student is a FCOS and the teacher a RetinaNet"),
    ],
)
def test_logits_that_cannot_be_compared_are_refused(tmp_path, opts, message):
    cfg, _ = config(tmp_path, RETINANET)
    cfg.merge_from_list(opts)
    with pytest.raises(UserError, match=message):
        attach_losses(build_model(cfg))


def test_an_rcnn_and_a_cascade_have_no_stages_in_common(tmp_path):
    cfg, _ = config(tmp_path, RCNN)
    cfg.merge_from_list(CASCADE)
    with pytest.raises(UserError, match="the student is a CascadeROIHeads and the teacher a StandardROIHeads"):
        attach_losses(build_model(cfg))


def test_sigmoid_box_heads_are_refused(tmp_path):
    cfg, _ = config(tmp_path, RCNN, ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"])
    with pytest.raises(UserError, match="USE_SIGMOID_CE"):
        attach_losses(build_model(cfg))


@pytest.mark.slow
def test_a_teacher_without_heads_is_refused(tmp_path):
    cfg, _ = config(tmp_path, RETINANET)
    pixels = PixelFormat.from_config(cfg)
    teacher = pretrained_teacher(build_model(toy.teacher_config()).backbone, str(tmp_path / "teacher.pth"), pixels)
    with pytest.raises(ArgumentError, match="logits.weight is 1.0, but the teacher, a backbone alone"):
        distilled_backbone(
            student=build_model(toy.plain_config()).backbone, teacher=teacher, pixels=pixels, logits={"weight": 1.0}
        )


def test_a_head_without_weights_is_an_error(tmp_path):
    cfg, teacher = config(tmp_path, RETINANET)
    state = teacher.state_dict()
    state.pop("head.cls_score.weight")
    torch.save({"model": state}, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="leave 1 of its tensors.*head.cls_score.weight"):
        build_model(cfg)
