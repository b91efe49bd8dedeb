"""The keys of MODEL.MGD that say how teacher and student compute, in a detector that trains."""

import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mgd_det.config import merge_config
from mgd_det.distillation import TeacherOptions
from mgd_det.errors import UserError
from mgd_det.modeling import attach_losses, named_teacher
from mgd_det.modeling.teachers import teacher_options

PREFIX = "MODEL.MGD.TEACHER."
OPTIONS = {"DTYPE": "bfloat16", "CHANNELS_LAST": True, "COMPILE": True, "FOLD_NORM": False}


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


def test_the_teacher_runs_before_the_student(weights):
    """The student's maps for backward are not in memory then."""
    detector, order = build(weights), []
    detector.backbone.mgd.teacher.backbone.register_forward_pre_hook(lambda *_: order.append("teacher"))
    detector.backbone.bottom_up.register_forward_pre_hook(lambda *_: order.append("student"))
    detector.backbone.mgd.distiller.register_forward_pre_hook(lambda *_: order.append("loss"))
    losses(detector)
    assert order == ["teacher", "student", "loss"]
