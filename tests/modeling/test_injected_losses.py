"""The losses that the injected distillation adds, what runs for them, and uses of the backbone that it refuses."""

import functools

import numpy as np
import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from injecting import POSITIONS, losses_of, losses_of_mode_as_it_is, match, plain_student
from torch.utils.checkpoint import checkpoint
from toy import RETINANET

from mgd_det.modeling import attach_losses


@pytest.mark.slow
def test_evaluation_is_the_students_and_does_not_run_the_teacher(cfg):
    detector, plain = build_model(cfg).eval(), plain_student(cfg).eval()
    plain.load_state_dict(detector.state_dict())
    match(detector)
    detector.backbone.mgd.teacher.backbone.bottom_up.forward = None  # calling it would raise
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for name, feature in detector.backbone(images).items():
            assert torch.equal(feature, plain.backbone(images)[name])
        detector(toy.batch())


@pytest.mark.slow
def test_without_gradients_there_is_no_distillation(cfg):
    """Precise batch norm and hooks that log a validation loss run the detector so, maybe before it is matched."""
    detector = build_model(cfg)
    attach_losses(detector)
    detector.backbone.mgd.teacher.backbone.bottom_up.forward = None
    with torch.no_grad():
        losses = losses_of(detector)
    assert set(losses) == {"loss_cls", "loss_box_reg"}


@pytest.mark.slow
def test_a_step_runs_each_bottom_up_once_and_nothing_else_of_the_teacher(cfg):
    detector = build_model(cfg)
    backbone = match(detector)
    calls = []
    student, teacher = detector.backbone.bottom_up, backbone.teacher.backbone.bottom_up
    student.register_forward_hook(lambda *_: calls.append("student"))
    teacher.register_forward_pre_hook(lambda *_: calls.append("teacher"))
    teacher.stem.register_forward_hook(lambda *_: calls.append("teacher stem"))
    backbone.teacher.backbone.fpn_lateral5.forward = None  # calling it would raise
    sum(losses_of(detector).values()).backward()
    assert sorted(calls) == ["student", "teacher", "teacher stem"]
    assert backbone.teacher.detector is None  # so that no head could run


def test_only_the_stages_that_a_position_needs_are_run(teachers):
    cfg = toy.distilled_config(teachers[RETINANET], opts=["MODEL.MGD.POSITIONS", "['res2', 'res3']"])
    detector = build_model(cfg)
    ran = []
    for name in ("res3", "res4", "res5"):
        detector.backbone.mgd.teacher.backbone.bottom_up.get_submodule(name)[0].register_forward_pre_hook(
            lambda *_, name=name: ran.append(name)
        )
    match(detector)
    losses_of(detector)
    assert set(ran) == {"res3"}


def test_measuring_runs_only_the_bottom_ups_in_eval_mode_and_restores_the_modes(cfg):
    detector = build_model(cfg).train()
    frozen = detector.backbone.bottom_up.stem
    frozen.eval()
    statistics = {k: v.clone() for k, v in detector.state_dict().items()}
    for module in (detector.head, detector.backbone.fpn_lateral3):
        module.forward = None
    match(detector)
    assert detector.training and detector.head.training and not frozen.training
    assert all(torch.equal(v, statistics[k]) for k, v in detector.state_dict().items())


@pytest.mark.slow
def test_gradients_reach_the_student_from_every_position(cfg):
    detector = build_model(cfg)
    match(detector)
    for position in POSITIONS:
        detector.zero_grad()
        losses_of(detector)[f"loss_mgd_{position}"].backward()
        block = detector.backbone.bottom_up.get_submodule(position)[-1]
        assert block.conv2.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_losses_are_those_of_the_features_rebuilt_by_hand(cfg):
    """The wrapper, end to end, against plain forwards of both nets and numpy."""
    cfg.MODEL.MGD.NORM, cfg.MODEL.MGD.LOSS.PARTIAL_L2.SCALE, cfg.MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS = "", "mean", [2.0]
    detector = build_model(cfg)
    toy.randomize_norms(detector)
    backbone = match(detector)
    inputs = toy.batch(((64, 64), (40, 56)))
    losses = losses_of(detector, inputs)

    def before_relu(resnet, x):
        features = {}
        x = resnet.stem(x)
        for name, stage in zip(resnet.stage_names, resnet.stages):
            for block in stage[:-1]:
                x = block(x)
            block, y = stage[-1], x
            convs = [block.conv1, block.conv2] + ([block.conv3] if hasattr(block, "conv3") else [])
            for i, conv in enumerate(convs):
                y = conv(y if i == 0 else torch.relu(y))
            features[name] = y + (x if block.shortcut is None else block.shortcut(x))
            x = torch.relu(features[name])
        return features

    images = detector.preprocess_image(inputs).tensor
    with torch.no_grad():
        student = before_relu(detector.backbone.bottom_up, images)
        teacher = before_relu(backbone.teacher.backbone.bottom_up, images)
    for p in backbone.distiller.positions:
        s, t = student[p.student].numpy(), teacher[p.teacher].numpy()
        groups, margin = backbone.distiller.groups(p).numpy(), backbone.distiller.margin(p).numpy()
        total = 0.0
        for i, group in enumerate(groups):
            members = t[:, group]
            best = np.take_along_axis(members, np.abs(members).argmax(1)[:, None], 1)[:, 0]
            target = np.maximum(best, margin[group].mean())
            counts = (s[:, i] > target) | (target > 0)
            total += ((s[:, i] - target) ** 2 * counts).sum()
        assert losses[f"loss_mgd_{p.name}"].item() == pytest.approx(2.0 * total / s.size, rel=1e-4)


@pytest.mark.slow
def test_a_teacher_with_other_pixels_sees_what_it_would_see_alone(cfg):
    """BGR with unit std, caffe's way, under an RGB student; images of two sizes, so that padding counts."""
    opts = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]", "MODEL.PIXEL_STD", "[1., 1., 1.]"]
    cfg.MODEL.MGD.TEACHER.OPTS = [*cfg.MODEL.MGD.TEACHER.OPTS, *opts]
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = "RGB", [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    detector = build_model(cfg)
    backbone = match(detector)
    seen = []
    backbone.teacher.backbone.bottom_up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = toy.batch(((64, 64), (40, 56)))
    losses_of(detector, inputs)

    alone = build_model(toy.teacher_config(opts=opts))
    for x in inputs:
        x["image"] = x["image"].flip(0)  # the data loader would have given the teacher BGR
    expected = alone.preprocess_image(inputs).tensor
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-3)
    assert (seen[0][1, :, 40:] == 0).all() and (seen[0][1, :, :, 56:] == 0).all()


def test_training_without_a_collector_or_a_matching_says_what_is_missing(cfg):
    detector = build_model(cfg).train()
    with pytest.raises(RuntimeError, match="MatchingUpdate"):
        losses_of(detector)
    attach_losses(detector)
    with pytest.raises(RuntimeError, match="solve_matching"):
        losses_of(detector)
    with pytest.raises(ValueError, match="MODEL.BACKBONE.NAME"):
        attach_losses(build_model(toy.plain_config()))


@pytest.mark.slow
def test_modes_that_contradict_each_other_are_an_error(cfg):
    detector = build_model(cfg)
    match(detector)
    detector.train().backbone.eval()
    with pytest.raises(RuntimeError, match="detector is in training mode and its backbone in eval mode"):
        losses_of_mode_as_it_is(detector)
    detector.eval().backbone.train()
    with pytest.raises(RuntimeError, match="detector is in eval mode and its backbone in training mode"):
        detector(toy.batch())
    assert "loss_mgd_res2" in losses_of(detector)  # in train() as a whole


@pytest.mark.slow
def test_losses_that_nobody_would_collect_are_an_error(cfg):
    detector = build_model(cfg)
    match(detector)
    detector.train()
    with EventStorage(), pytest.raises(RuntimeError, match=r"detector\(batch\), not its backbone or detector.forward"):
        detector.forward(toy.batch())
    with pytest.raises(RuntimeError, match="nothing collects"):
        detector.backbone(torch.rand(1, 3, 64, 64))
    with torch.no_grad():
        detector.backbone(torch.rand(1, 3, 64, 64))
    assert "loss_mgd_res2" in losses_of(detector)


@pytest.mark.slow
def test_a_second_run_of_the_backbone_in_one_forward_is_an_error(cfg):
    detector = build_model(cfg)
    match(detector)
    detector.head.register_forward_pre_hook(lambda *_: detector.backbone(torch.rand(1, 3, 64, 64)))
    with pytest.raises(RuntimeError, match="second time"):
        losses_of(detector)


@pytest.mark.slow
def test_a_forward_that_raised_leaves_nothing_behind(cfg):
    detector = build_model(cfg)
    match(detector)
    expected = losses_of(detector)
    for name in ("backbone.bottom_up.res4", "head"):
        module = detector.get_submodule(name)
        module = module[0] if name != "head" else module
        forward, module.forward = module.forward, None
        with pytest.raises(TypeError):
            losses_of(detector)
        module.forward = forward
        again = losses_of(detector)
        # RetinaNet's own running normaliser moves its losses.
        assert all(torch.equal(again[f"loss_mgd_{p}"], expected[f"loss_mgd_{p}"]) for p in POSITIONS)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_is_equal_or_an_error(cfg, use_reentrant):
    """Of the last block of a stage, whose feature is read inside."""
    detector, twin = build_model(cfg), build_model(cfg)
    twin.load_state_dict(detector.state_dict())
    for each in (detector, twin):
        torch.manual_seed(0)
        match(each)
    stage = twin.backbone.bottom_up.res4
    block = stage[-1]
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)
    if use_reentrant:
        with pytest.raises(RuntimeError, match="res4 has lost its graph.*use_reentrant=False"):
            losses_of(twin)
        return
    for each in (detector, twin):
        losses_of(each)["loss_mgd_res4"].backward()
    expected = detector.backbone.bottom_up.res4[-1].conv1.weight.grad
    torch.testing.assert_close(stage[-1].conv1.weight.grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_whole_backbone_under_checkpointing_is_an_error(cfg, use_reentrant):
    detector = build_model(cfg)
    match(detector)
    backbone = detector.backbone
    names = list(backbone.output_shape())

    class Checkpointed(torch.nn.Module):
        size_divisibility, padding_constraints = backbone.size_divisibility, backbone.padding_constraints

        def __init__(self):
            super().__init__()
            self.backbone = backbone

        def forward(self, images):
            images.requires_grad_()
            run = functools.partial(checkpoint, use_reentrant=use_reentrant)
            levels = run(lambda x: tuple(self.backbone(x).values()), images)
            return dict(zip(names, levels))

    detector.backbone = Checkpointed()
    with pytest.raises(RuntimeError, match="stages or blocks inside it .*not the backbone itself"):
        sum(losses_of(detector).values()).backward()
