"""A teacher's dense convolutions in a student's separable ones, compared with the sliced dense net and with numpy."""

import copy

import numpy as np
import pytest
import torch
import toy
from detectron2.modeling import build_model
from torch import nn
from torch.nn.functional import conv2d

from mgd_det.modeling import (
    NarrowingOptions,
    find_distillation,
    inherit,
    inherit_from_config,
    inherit_from_teacher,
    narrow,
    narrowing,
)
from mgd_det.modeling.channel_layout import channel_layout
from mgd_det.modeling.light import make_separable

pytestmark = pytest.mark.slow

BOTH = ["fpn", "head"]
UNMEASURED = NarrowingOptions("weight", compensate=False)
KINDS = {
    "retinanet": ["MODEL.RETINANET.NUM_CONVS", "2"],
    "fcos": ["MODEL.FCOS.NUM_CONVS", "2"],
    "mask_rcnn": ["MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1"],
}
NARROW = ["MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "6"]


def build(kind, opts=(), seed=3):
    base, more = toy.DETECTORS[kind]
    torch.manual_seed(seed)
    made = build_model(toy.teacher_config(base, [*more, *KINDS[kind], *opts])).cpu().eval()
    toy.randomize_norms(made)
    for name, parameter in made.named_parameters():
        if ".cls_score.weight" in name or "bbox" in name and name.endswith("weight") or "objectness" in name:
            nn.init.normal_(parameter, std=0.2)  # so that there are detections
    return made


def separable_copy(detector):
    made = copy.deepcopy(detector)
    parts = [made.backbone]
    if hasattr(made, "head"):
        parts.append(made.head)
    else:
        parts += [made.proposal_generator.rpn_head, made.roi_heads.mask_head, made.roi_heads.box_head]
    for part in parts:
        make_separable(part)
    return made


def dense_layers(detector):
    """Names of the convolutions that a separable copy has in two parts."""
    return [
        name
        for name, module in detector.named_modules()
        if isinstance(module, nn.Conv2d) and "bottom_up" not in name and module.kernel_size[0] > 1
    ]


def detections(detector):
    with torch.no_grad():
        return [result["instances"] for result in detector(toy.batch(((64, 96), (64, 96))))]


def numpy_factors(weight):
    """The share of the energy that is kept, and the approximation, by numpy and one channel after the other."""
    weight = weight.double().numpy()
    approximation, kept = np.zeros_like(weight), 0.0
    for channel in range(weight.shape[1]):
        u, s, v = np.linalg.svd(weight[:, channel].reshape(len(weight), -1))
        approximation[:, channel] = (s[0] * np.outer(u[:, 0], v[0])).reshape(weight[:, channel].shape)
        kept += s[0] ** 2
    return kept / (weight**2).sum(), approximation


def product(layer):
    return (layer.weight * layer.depthwise.weight.transpose(0, 1)).detach().numpy()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_separable_kernels_lose_nothing(kind):
    wide, dense = build(kind), build(kind, NARROW)
    dense.backbone.bottom_up.load_state_dict(wide.backbone.bottom_up.state_dict())
    for name in dense_layers(wide):
        weight = wide.get_submodule(name).weight
        weight.copy_(weight[:, :, :1, :1] * torch.randn(weight.shape[1], *weight.shape[2:]))
    student = separable_copy(dense)
    narrowed = narrow(wide, dense, wide.state_dict(), UNMEASURED)
    inherit(dense, wide.state_dict(), BOTH, narrowed=narrowed)
    report = inherit(student, wide.state_dict(), BOTH, narrowed=narrow(wide, student, wide.state_dict(), UNMEASURED))
    assert report.factorised == pytest.approx(dict.fromkeys(dense_layers(dense), 1.0))
    assert not report.other_shape and not report.not_in_teacher and not report.not_in_student
    expected, found = detections(dense), detections(student)
    assert sum(map(len, expected)) > 0
    for theirs, own in zip(expected, found):
        assert len(theirs) == len(own)
        torch.testing.assert_close(own.scores, theirs.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_layers_that_no_batch_reaches_are_compensated_before_they_are_split(monkeypatch):
    monkeypatch.setattr(narrowing, "factorised_layers", lambda *args: [])  # none has a measurement
    wide, dense = build("retinanet"), build("retinanet", NARROW)
    student = separable_copy(dense)
    batch = toy.batch()
    inherit(dense, wide.state_dict(), BOTH, narrowed=narrow(wide, dense, wide.state_dict(), batches=[batch]))
    narrowed = narrow(wide, student, wide.state_dict(), batches=[batch])
    report = inherit(student, wide.state_dict(), BOTH, narrowed=narrowed)
    name = "head.cls_subnet.0"
    sliced = wide.get_submodule(name).weight[:, narrowed.channels["fpn"]][narrowed.channels[name]]
    assert not torch.allclose(sliced, dense.get_submodule(name).weight, rtol=0.1)  # it has been compensated
    for name in dense_layers(dense):
        kept, approximation = numpy_factors(dense.get_submodule(name).weight)
        np.testing.assert_allclose(product(student.get_submodule(name)), approximation, rtol=1e-3, atol=1e-5)
        assert 1 / 9 < kept < 0.9 and report.factorised[name] == pytest.approx(kept, rel=1e-5)
        assert f"{name}, {100 * kept:.1f} %" in str(report)
        if dense.get_submodule(name).bias is not None:
            assert torch.equal(student.get_submodule(name).bias, dense.get_submodule(name).bias)


def pixels(maps, channels):
    """(pixels of all maps, channels), each map counting as much as any other."""
    rows = [m[:, channels].double().movedim(1, -1).flatten(0, -2) / m[:, 0].numel() ** 0.5 for m in maps]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("opts", [[], NARROW])
@torch.no_grad()
def test_pointwise_weights_are_fitted_to_the_teachers_outputs(opts):
    wide, student = build("retinanet"), separable_copy(build("retinanet", opts))
    batches = [toy.batch(((96, 128), (96, 128)), seed=seed) for seed in range(2)]
    narrowed = narrow(wide, student, wide.state_dict(), batches=batches)
    report = inherit(student, wide.state_dict(), BOTH, narrowed=narrowed)
    assert set(narrowed.factors) == set(report.factorised) == set(dense_layers(wide))
    layout = channel_layout(wide)
    for name in ("head.cls_subnet.0", "backbone.top_block.p7", "head.bbox_pred"):
        layer, own, inputs = wide.get_submodule(name), student.get_submodule(name), []
        handle = layer.register_forward_pre_hook(lambda module, args, to=inputs: to.append(args[0]))
        for batch in batches:
            wide(batch)
        handle.remove()
        made, read = (
            narrowed.channels.get(channels or "", torch.arange(size))
            for channels, size in zip(layout.axes[f"{name}.weight"], layer.weight.shape)
        )
        own_inputs = [x[:, read] for x in inputs]
        filtered = pixels([own.depthwise(x) for x in own_inputs], slice(None))
        expected = pixels([conv2d(x, layer.weight, None, layer.stride, layer.padding) for x in inputs], made)
        best = filtered @ np.linalg.lstsq(filtered, expected, rcond=None)[0]
        found = filtered @ own.weight[:, :, 0, 0].double().numpy().T
        least, error = (((x - expected) ** 2).sum() / (expected**2).sum() for x in (best, found))
        assert least * 0.999 <= error < least + 0.01
        assert narrowed.factors[name].error == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert f"error of its outputs {100 * narrowed.factors[name].error:.1f} %" in str(report)
        _, plain = numpy_factors(layer.weight)
        plain = torch.from_numpy(plain)[made][:, read].to(layer.weight)
        plain = pixels([conv2d(x, plain, None, layer.stride, layer.padding) for x in own_inputs], slice(None))
        assert error < 0.9 * ((plain - expected) ** 2).sum() / (expected**2).sum()


@torch.no_grad()
def test_a_student_as_wide_as_its_teacher_inherits_whole_kernels_split():
    wide = build("retinanet")
    student = separable_copy(build("retinanet", seed=4))
    before = copy.deepcopy(student.state_dict())
    report = inherit(student, wide.state_dict(), ["head"])
    assert set(report.factorised) == {name for name in dense_layers(wide) if name.startswith("head.")}
    for name in report.factorised:
        kept, approximation = numpy_factors(wide.get_submodule(name).weight)
        np.testing.assert_allclose(product(student.get_submodule(name)), approximation, rtol=1e-3, atol=1e-5)
        layer = student.get_submodule(name)
        assert report.inherited[f"{name}.weight"] == layer.weight.numel()
        assert report.inherited[f"{name}.depthwise.weight"] == layer.depthwise.weight.numel()
    rows = {line.split()[0]: line.split()[1:] for line in str(report).splitlines() if line.strip()}
    layer = student.head.cls_score
    assert rows["head.cls_score"][:2] == ["3", str(sum(p.numel() for p in layer.parameters()))]
    after = student.state_dict()
    untouched = [name for name in after if name.startswith("backbone.")]
    assert untouched and all(torch.equal(after[name], before[name]) for name in untouched)


@torch.no_grad()
def test_a_student_as_wide_as_its_teacher_is_measured_if_it_is_to_be_fitted(tmp_path):
    teacher = toy.save_teacher(tmp_path / "teacher.pth")
    cfg = toy.plain_config(opts=["MODEL.META_ARCHITECTURE", "SeparableRetinaNet", "MODEL.MGD.INHERIT", "['head']"])
    cfg.MODEL.MGD.TEACHER.CONFIG_FILE, cfg.MODEL.MGD.TEACHER.WEIGHTS = toy.RETINANET, teacher
    cfg.MODEL.MGD.TEACHER.OPTS = toy.teacher_opts()
    student = build_model(cfg)
    report = inherit_from_config(cfg, student, lambda image_format: [toy.batch()])
    assert set(report.narrowed.factors) == set(report.factorised) and "head.cls_score" in report.factorised
    cfg.MODEL.MGD.INHERIT_CHANNELS.COMPENSATE = False
    report = inherit_from_config(cfg, student, lambda image_format: pytest.fail("measured"))
    weight = torch.load(teacher)["model"]["head.cls_score.weight"]
    np.testing.assert_allclose(product(student.cpu().head.cls_score), numpy_factors(weight)[1], rtol=1e-3, atol=1e-5)
    assert report.narrowed is None


@torch.no_grad()
def test_zero_kernels_stay_zero():
    wide = build("retinanet")
    wide.head.cls_score.weight.zero_()
    student = separable_copy(wide)
    assert inherit(student, wide.state_dict(), ["head"]).factorised["head.cls_score"] == 1
    assert not product(student.head.cls_score).any()


@torch.no_grad()
def test_both_parts_of_a_class_layer_of_other_classes_stay_the_students():
    wide = build("retinanet")
    student = separable_copy(build("retinanet", seed=4))
    before = copy.deepcopy(student.head.cls_score.state_dict())
    report = inherit(student, wide.state_dict(), BOTH, same_classes=False)
    assert "head.cls_score" not in report.factorised and "head.bbox_pred" in report.factorised
    assert set(report.other_classes) == {"head.cls_score.weight", "head.cls_score.bias"}
    after = student.head.cls_score.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@torch.no_grad()
def test_kernels_of_another_size_are_listed():
    wide = build("retinanet")
    student = separable_copy(wide)
    wide.head.cls_score = nn.Conv2d(16, wide.head.cls_score.out_channels, 5, padding=2)
    report = inherit(student, wide.state_dict(), ["head"])
    assert report.other_shape["head.cls_score.weight"][0][2:] == (5, 5)
    assert "head.cls_score.depthwise.weight" in report.not_in_teacher


@pytest.mark.parametrize("opts", [[], NARROW])
@torch.no_grad()
def test_of_a_longer_tower_what_has_a_counterpart_is_inherited_and_the_rest_is_listed(opts):
    wide = build("retinanet", ["MODEL.RETINANET.NUM_CONVS", "3"])
    student = separable_copy(build("retinanet", opts))
    report = inherit(student, wide.state_dict(), BOTH, narrowed=narrow(wide, student, wide.state_dict(), UNMEASURED))
    towers = {f"head.{name}_subnet.{place}" for name in ("cls", "bbox") for place in first_two(wide)}
    assert towers <= set(report.factorised)
    assert "head.cls_subnet.6.weight" in report.not_in_student and "not in" in str(report)
    # The predictors read a set of channels that a narrower student has not chosen: it has no such layer.
    assert ("head.cls_score" in report.factorised) == (not opts)
    assert ("head.cls_score.weight" in report.other_shape) == bool(opts)


def first_two(detector):
    return [name for name, layer in detector.head.cls_subnet.named_children() if isinstance(layer, nn.Conv2d)][:2]


def light_opts():
    return ["MODEL.META_ARCHITECTURE", "SeparableRetinaNet", "MODEL.FPN.OUT_CHANNELS", "8"]


def test_a_light_retinanet_inherits_from_a_retinanet_by_config_and_by_keyword(tmp_path):
    teacher = toy.save_teacher(tmp_path / "teacher.pth")
    opts = [*light_opts(), "MODEL.MGD.INHERIT", str(BOTH), "MODEL.MGD.POSITIONS", "['p3', 'p5']"]
    opts += ["MODEL.MGD.STUDENT_BACKBONE", "build_retinanet_resnet_separable_fpn_backbone"]
    cfg = toy.distilled_config(teacher, opts=[*opts, "MODEL.MGD.LOSS.NAMES", "['pkd']"])
    students = []
    for _ in range(2):
        torch.manual_seed(1)
        students.append(build_model(cfg))
    batches = [toy.batch()]
    report = inherit_from_config(cfg, students[0], lambda image_format: batches)
    assert {"head.cls_score", "head.bbox_subnet.0", "backbone.fpn_output3", "backbone.top_block.p7"} <= set(
        report.factorised
    )
    distiller = find_distillation(students[0]).distiller
    for position in distiller.inheriting_positions:
        assert torch.equal(distiller.groups(position)[:, 0].cpu(), report.narrowed.channels["fpn"])
    assert set(report.narrowed.factors) >= {"head.cls_score", "head.bbox_subnet.0", "backbone.fpn_output3"}
    assert [position.name for position in distiller.inheriting_positions] == ["p3", "p5"]
    arguments = {"config_file": toy.RETINANET, "weights": teacher, "opts": toy.teacher_opts(), "parts": BOTH}
    inherit_from_teacher(students[1], **arguments, build_batches=lambda image_format: batches)
    states = [student.state_dict() for student in students]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
