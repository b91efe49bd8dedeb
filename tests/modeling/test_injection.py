import copy

import numpy as np
import pytest
import torch
import toy
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.events import EventStorage
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from toy import RCNN, RETINANET

from mgd_det.config import without_distillation
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import attach_losses, distilled_backbone, find_distillation

POSITIONS = ("res2", "res3", "res4", "res5")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {base: toy.save_teacher(folder / f"{i}.pth", base) for i, base in enumerate((RETINANET, RCNN))}


@pytest.fixture
def cfg(teachers):
    return toy.distilled_config(teachers[RETINANET])


def match(detector, batch=None):
    """One update of the matching, without a trainer; the Distillation of the detector."""
    attach_losses(detector)
    distillation = find_distillation(detector)
    distillation.solve_matching(detector, [batch or toy.batch()])
    return distillation


def losses_of(detector, batch=None):
    with EventStorage():
        return detector.train()(batch or toy.batch())


def losses_of_mode_as_it_is(detector):
    with EventStorage():
        return detector(toy.batch())


def plain_student(cfg):
    return build_model(without_distillation(cfg))


@pytest.mark.slow
@pytest.mark.parametrize("student", ["resnet", "mobilenetv2"])
@pytest.mark.parametrize("base", [RETINANET, RCNN])
def test_every_detector_trains_and_evaluates_with_each_student(teachers, base, student):
    detector = build_model(toy.distilled_config(teachers[base], base, student))
    match(detector)
    losses = losses_of(detector)
    assert [name for name in losses if "mgd" in name] == [f"loss_mgd_{p}" for p in POSITIONS]
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    idle = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []  # else DistributedDataParallel would need find_unused_parameters
    results = detector.eval()(toy.batch())
    assert results[0]["instances"].has("pred_masks") == (base == RCNN)


@pytest.mark.slow
@pytest.mark.parametrize("base, student", [(RETINANET, "resnet"), (RETINANET, "mobilenetv2"), (RCNN, "shufflenetv2")])
def test_names_shapes_and_order_are_the_plain_students(teachers, base, student):
    cfg = toy.distilled_config(teachers[base], base, student)
    detector, plain = build_model(cfg), plain_student(cfg)
    match(detector)

    def shapes(named):
        return [(name, tuple(tensor.shape)) for name, tensor in named]

    assert shapes(detector.state_dict().items()) == shapes(plain.state_dict().items())
    own = [name for name, _ in detector.named_parameters() if name.startswith("backbone.mgd.")]
    assert own == [f"backbone.mgd.distiller.norms.{p}.{kind}" for p in POSITIONS for kind in ("weight", "bias")]
    others = [(name, p) for name, p in detector.named_parameters() if name not in own]
    assert shapes(others) == shapes(plain.named_parameters())


def test_the_backbone_is_the_students_own(cfg):
    detector, plain = build_model(cfg), plain_student(cfg)
    assert type(detector.backbone) is type(plain.backbone)
    assert detector.backbone.output_shape() == plain.backbone.output_shape()
    children = [name for name, _ in detector.backbone.named_children()]
    assert children == [name for name, _ in plain.backbone.named_children()] + ["mgd"]
    with pytest.raises(ArgumentError, match="'mgd'"):
        distilled_backbone(student=detector.backbone, teacher=None, pixels=None)


def test_rules_by_name_reach_the_student(cfg):
    """Detectron2's factor of the learning rate by the parameter's name."""

    def factor(name):
        return 0.1 if name.startswith("backbone.bottom_up.") else 1.0

    groups, expected = (
        get_default_optimizer_params(model, base_lr=1.0, lr_factor_func=factor)
        for model in (build_model(cfg), plain_student(cfg))
    )

    def slow(groups):
        return sum(p.numel() for group in groups if group["lr"] == 0.1 for p in group["params"])

    assert slow(groups) == slow(expected) > 0


@pytest.mark.slow
def test_a_submodule_that_is_set_is_the_one_that_runs(cfg):
    detector = build_model(cfg).eval()
    detector.backbone.top_block = copy.deepcopy(detector.backbone.top_block)
    torch.nn.init.zeros_(detector.backbone.top_block.p6.weight)
    torch.nn.init.constant_(detector.backbone.top_block.p6.bias, 0.25)
    with torch.no_grad():
        assert (detector.backbone(torch.rand(1, 3, 64, 64))["p6"] == 0.25).all()
    # One whose feature is distilled is no longer read, which must not pass unseen.
    match(detector)
    detector.backbone.bottom_up = copy.deepcopy(detector.backbone.bottom_up)
    with pytest.raises(RuntimeError, match="did not run the module of feature 'res2'"):
        losses_of(detector)


@pytest.mark.slow
def test_the_state_dict_loads_into_the_plain_student_and_back(cfg, tmp_path):
    detector, plain = build_model(cfg), plain_student(cfg)
    toy.randomize_norms(detector)
    plain.load_state_dict(detector.state_dict())  # strict
    again = build_model(cfg)
    again.load_state_dict(plain.state_dict())  # strict
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    third = build_model(cfg)
    DetectionCheckpointer(third).load(str(tmp_path / "plain.pth"))
    batch = toy.batch()
    with torch.no_grad():
        expected = detector.backbone.eval()(batch[0]["image"].float()[None])
        for other in (plain.backbone, again.backbone, third.backbone):
            for name, feature in other.eval()(batch[0]["image"].float()[None]).items():
                assert torch.equal(feature, expected[name])


@pytest.mark.slow
def test_missing_and_unexpected_keys_are_named_as_in_the_file(cfg):
    detector = build_model(cfg)
    state = detector.state_dict()
    state.pop("backbone.bottom_up.res2.0.conv1.weight")
    state["backbone.bottom_up.stranger"] = torch.zeros(1)
    incompatible = detector.load_state_dict(state, strict=False)
    assert incompatible.missing_keys == ["backbone.bottom_up.res2.0.conv1.weight"]
    assert incompatible.unexpected_keys == ["backbone.bottom_up.stranger"]


@pytest.mark.slow
def test_weights_of_another_width_load_as_far_as_they_fit(cfg, tmp_path):
    wide = build_model(toy.plain_config(opts=["MODEL.FPN.OUT_CHANNELS", 32]))
    torch.save({"model": wide.state_dict()}, tmp_path / "wide.pth")
    detector = build_model(cfg)
    DetectionCheckpointer(detector).load(str(tmp_path / "wide.pth"))
    assert torch.equal(detector.backbone.bottom_up.res2[0].conv1.weight, wide.backbone.bottom_up.res2[0].conv1.weight)


@pytest.mark.slow
def test_inputs_by_keyword(cfg):
    detector = build_model(cfg)
    match(detector)
    assert "instances" in detector.eval()(batched_inputs=toy.batch())[0]
    with EventStorage():
        assert "loss_mgd_res2" in detector.train()(batched_inputs=toy.batch())


@pytest.mark.slow
def test_distillation_changes_neither_the_initial_weights_nor_the_detection_losses(cfg):
    torch.manual_seed(3)
    plain = plain_student(cfg)
    torch.manual_seed(3)
    detector = build_model(cfg)
    for (name, a), (_, b) in zip(plain.state_dict().items(), detector.state_dict().items()):
        assert torch.equal(a, b), name
    match(detector)
    expected, losses = losses_of(plain), losses_of(detector)
    for name in expected:
        assert torch.equal(losses[name], expected[name]), name


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
def test_the_teacher_stays_out_of_modules_and_optimizer_and_in_eval_mode(cfg):
    detector = build_model(cfg)
    teacher = detector.backbone.mgd.teacher.backbone.bottom_up
    theirs = {id(p) for p in teacher.parameters()} | {id(m) for m in teacher.modules()}
    assert theirs.isdisjoint(id(p) for p in detector.parameters())
    assert theirs.isdisjoint(id(m) for m in detector.modules())
    groups = build_optimizer(cfg, detector).param_groups
    assert theirs.isdisjoint(id(p) for group in groups for p in group["params"])
    detector.eval()
    detector.train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_follows_to(cfg):
    detector = build_model(cfg)
    detector.to(torch.device("meta"))
    assert all(p.device.type == "meta" for p in detector.backbone.mgd.teacher.backbone.bottom_up.parameters())


@pytest.mark.slow
def test_a_deep_copy_collects_its_own_losses(cfg):
    detector = build_model(cfg)
    match(detector)
    twin = copy.deepcopy(detector)
    for p in twin.backbone.mgd.distiller.parameters():
        torch.nn.init.zeros_(p)
    original, copied = losses_of(detector), losses_of(twin)
    assert copied["loss_mgd_res3"] != original["loss_mgd_res3"]


@pytest.mark.slow
def test_a_deep_copy_inside_a_window_is_without_its_observer(cfg):
    detector = build_model(cfg)
    distillation = match(detector)

    class Trainer:
        def observe(self, student, teacher):
            self.seen = list(student)

        def __deepcopy__(self, memo):
            raise AssertionError("the copy drags the trainer along")

    trainer = Trainer()
    distillation.observer = trainer.observe
    twin = copy.deepcopy(detector)
    losses_of(twin)
    assert twin.backbone.mgd.observer is None and not hasattr(trainer, "seen")
    losses_of(detector)
    assert trainer.seen == list(POSITIONS)


@pytest.mark.slow
def test_a_deep_copy_shares_the_teacher_until_one_moves(cfg):
    detector = build_model(cfg)
    distillation = match(detector)
    twin = copy.deepcopy(detector)
    other = twin.backbone.mgd.teacher
    assert other.backbone is distillation.teacher.backbone
    twin.to(torch.device("meta"))
    assert {p.device.type for p in other.backbone.parameters()} == {"meta"}
    assert {p.device.type for p in distillation.teacher.backbone.parameters()} == {"cpu"}
    assert losses_of(detector)["loss_mgd_res2"].isfinite()


@pytest.mark.slow
def test_an_average_of_the_model_that_was_made_before_the_first_matching(cfg):
    detector = build_model(cfg)
    attach_losses(detector)
    average = AveragedModel(detector, use_buffers=True)
    average.update_parameters(detector)
    match(detector)
    with torch.no_grad():
        for p in detector.parameters():
            p.add_(1.0)
    average.update_parameters(detector)
    assert list(average.module.state_dict()) == list(plain_student(cfg).state_dict())
    weight, averaged = detector.backbone.fpn_output3.weight, average.module.backbone.fpn_output3.weight
    torch.testing.assert_close(averaged, weight - 0.5)  # the mean of two models, one apart
    averaged_groups = average.module.backbone.mgd.distiller.groups(detector.backbone.mgd.distiller.positions[0])
    assert averaged_groups.shape == (64, 2)


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
def test_a_whole_backbone_under_reentrant_checkpointing_is_an_error(cfg):
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
            levels = checkpoint(lambda x: tuple(self.backbone(x).values()), images.requires_grad_(), use_reentrant=True)
            return dict(zip(names, levels))

    detector.backbone = Checkpointed()
    with pytest.raises(RuntimeError, match="reentrant"):
        losses_of(detector)


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
    from mgd_det.modeling import distilled_backbone, pretrained_teacher

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
