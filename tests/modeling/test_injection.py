"""The backbone with distillation is the student's own, by names, weights, copies and checkpoints."""

import copy

import pytest
import torch
import toy
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.events import EventStorage
from injecting import POSITIONS, losses_of, match, plain_student
from torch.optim.swa_utils import AveragedModel
from toy import RCNN, RETINANET

from mgd_det.errors import ArgumentError
from mgd_det.modeling import attach_losses, distilled_backbone


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
