"""The keys of MODEL.MGD that say how teacher and student compute, in a detector that trains."""

import functools

import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from mgd_det.config import merge_config
from mgd_det.distillation import TeacherOptions, compilation
from mgd_det.distillation import teacher as teacher_module
from mgd_det.errors import UserError
from mgd_det.modeling import named_teacher
from mgd_det.modeling.injection import attach_losses, find_mgd_backbone
from mgd_det.modeling.teacher_builder import teacher_options

PREFIX = "MODEL.MGD.TEACHER."
OPTIONS = {"DTYPE": "bfloat16", "CHANNELS_LAST": True, "COMPILE": True, "FOLD_NORM": False, "OWN_STREAM": True}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return toy.save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture(scope="module")
def plain(weights):
    return losses(build(weights, ["MODEL.MGD.TEACHER.FOLD_NORM", "False"]))


def build(weights, opts=()):
    torch.manual_seed(0)
    detector = build_model(toy.distilled_config(weights, opts=opts))
    attach_losses(detector)
    toy.solve_matching(detector)
    return detector.train()


def losses(detector):
    with EventStorage():
        return detector(toy.batch(((64, 64), (64, 96))))


def test_every_key_reaches_the_teacher():
    opts = [text for key, value in OPTIONS.items() for text in (PREFIX + key, str(value))]
    options = teacher_options(merge_config("", opts))
    assert options == TeacherOptions(**{key.lower(): value for key, value in OPTIONS.items()})
    assert teacher_options(merge_config("", [])) == TeacherOptions()
    with pytest.raises(UserError, match="DTYPE is 'half'; use one of auto, float32, bfloat16, float16"):
        teacher_options(merge_config("", [PREFIX + "DTYPE", "half"]))


def test_keyword_arguments_say_the_same(weights):
    options = TeacherOptions(dtype="bfloat16", channels_last=True)
    teacher = named_teacher(config_file=toy.RETINANET, weights=weights, opts=toy.teacher_opts(), options=options)
    assert teacher.options == options


@pytest.mark.parametrize(
    "opts, tolerance",
    [([], 1e-4), ([PREFIX + "CHANNELS_LAST", "True"], 1e-4), ([PREFIX + "DTYPE", "bfloat16"], 0.05)],
    ids=["folded", "channels_last", "bfloat16"],
)
def test_the_losses_stay_within_a_tolerance(weights, plain, opts, tolerance):
    detector = build(weights, opts)
    values = losses(detector)
    assert list(values) == list(plain)
    for name, value in values.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, plain[name], rtol=tolerance, atol=0)
    sum(values.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_trains_under_autocast(weights, plain, dtype):
    detector = build(weights, [PREFIX + "DTYPE", dtype])
    with torch.autocast("cpu", torch.bfloat16):
        values = losses(detector)
    sum(values.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.requires_grad)
    for name, value in values.items():
        assert value.dtype == torch.float32 and value.isfinite()
        if "mgd" in name:
            torch.testing.assert_close(value, plain[name].detach(), rtol=0.05, atol=0)


def test_the_teacher_is_begun_before_the_student_and_joined_before_the_loss(weights, monkeypatch):
    detector = build(weights, [PREFIX + "OWN_STREAM", "True"])
    backbone, order = find_mgd_backbone(detector), []

    def queue_beside(function, images):
        order.append("teacher begun")
        result = function(images)
        return lambda: order.append("joined") or result

    monkeypatch.setattr(teacher_module, "queue_beside", queue_beside)
    backbone.student.register_forward_pre_hook(lambda *_: order.append("student"))
    backbone.distiller.register_forward_pre_hook(lambda *_: order.append("loss"))
    losses(detector)
    assert order == ["teacher begun", "student", "joined", "loss"]


def test_a_compiled_student_has_the_same_losses_and_state(weights, monkeypatch):
    torch._dynamo.reset()
    # Traced, and run without a compiler.
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr(compilation, "_problem", lambda device: "")
    detectors = [build(weights), build(weights, ["MODEL.MGD.COMPILE_STUDENT", "True"])]
    results = []
    for detector in detectors:
        values = losses(detector)
        sum(values.values()).backward()
        gradient = find_mgd_backbone(detector).student.bottom_up.res3[0].conv1.weight.grad
        results.append((values, gradient))
    assert list(detectors[0].state_dict()) == list(detectors[1].state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
