"""The keys of MODEL.MGD that say how teacher and student compute, in a detector that trains."""

import copy
import hashlib

import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mgd_det.config import merge_config
from mgd_det.distillation import TeacherOptions
from mgd_det.engine import MatchingUpdate
from mgd_det.errors import UserError
from mgd_det.modeling import attach_losses, find_distillation, named_teacher
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_teacher_runs_before_the_student(weights):
    """The student's maps for backward are not in memory then."""
    detector, order = build(weights), []
    detector.backbone.mgd.teacher.backbone.register_forward_pre_hook(lambda *_: order.append("teacher"))
    detector.backbone.bottom_up.register_forward_pre_hook(lambda *_: order.append("student"))
    detector.backbone.mgd.distiller.register_forward_pre_hook(lambda *_: order.append("loss"))
    losses(detector)
    assert order == ["teacher", "student", "loss"]


def hash_of(weights, opts=()):
    detector = build_model(toy.distilled_config(weights, opts=opts))
    attach_losses(detector)
    distillation = find_distillation(detector)
    assert distillation.distiller.teacher_hash == distillation.teacher.weights_hash
    return distillation.distiller.teacher_hash


@pytest.fixture(scope="module")
def expected_hash(weights):
    """Of the tensors of the bottom-up in the checkpoint."""
    result = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(torch.load(weights)["model"].items()):
        if name.startswith("backbone.bottom_up.") and tensor.is_floating_point():
            result.update(f"{name[len('backbone.') :]} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return result.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts",
    [[], ["FOLD_NORM", "False"], ["DTYPE", "bfloat16"], ["CHANNELS_LAST", "True"]],
    ids=lambda opts: "".join(opts),
)
def test_the_hash_of_the_weights_is_of_what_was_loaded(weights, expected_hash, opts):
    assert hash_of(weights, [PREFIX + key if i % 2 == 0 else key for i, key in enumerate(opts)]) == expected_hash


@pytest.mark.slow
@pytest.mark.parametrize("name, is_read", [("backbone.bottom_up.res4", True), ("backbone.fpn_output3", False)])
def test_the_hash_tells_weights_that_run_from_others(weights, expected_hash, tmp_path, name, is_read):
    checkpoint = torch.load(weights)
    key = next(key for key in checkpoint["model"] if key.startswith(name) and key.endswith("weight"))
    checkpoint["model"][key].view(-1)[3] += 1e-3
    torch.save(checkpoint, tmp_path / "other.pth")
    assert (hash_of(str(tmp_path / "other.pth")) != expected_hash) == is_read


@pytest.mark.slow
def test_the_hash_of_heads_that_teach(weights, tmp_path):
    checkpoint = torch.load(weights)
    checkpoint["model"]["head.cls_score.weight"].view(-1)[3] += 1e-3
    torch.save(checkpoint, tmp_path / "other.pth")
    hashes = {}
    for name, path, weight in (("own", weights, 1.0), ("other", tmp_path / "other.pth", 1.0), ("off", weights, 0.0)):
        detector = build_model(toy.distilled_config(str(path), opts=["MODEL.MGD.LOGITS.WEIGHT", str(weight)]))
        attach_losses(detector)
        distiller = find_distillation(detector).distiller
        hashes[name] = (distiller.teacher_hash, distiller.detector_hash)
    assert hashes["own"][0] == hashes["other"][0] == hashes["off"][0]
    assert hashes["own"][1] != hashes["other"][1] and hashes["off"][1] == ""


@pytest.mark.slow
def test_a_deep_copy_has_the_hash_of_what_was_loaded(weights, expected_hash):
    detector = build_model(toy.distilled_config(weights))
    twin = copy.deepcopy(detector)
    for each in (detector, twin):  # the first folds the norms of the network that both share
        attach_losses(each)
        assert find_distillation(each).distiller.teacher_hash == expected_hash


@pytest.mark.slow
def test_a_training_does_not_resume_with_another_teacher(weights, tmp_path):
    checkpoint = torch.load(weights)
    for tensor in checkpoint["model"].values():
        if tensor.is_floating_point():
            tensor.mul_(1.01)
    torch.save(checkpoint, tmp_path / "other.pth")
    hooks = [
        MatchingUpdate(build_model(toy.distilled_config(path)), num_batches=1, periods=[10])
        for path in (weights, str(tmp_path / "other.pth"), weights)
    ]
    state = hooks[0].state_dict()
    with pytest.raises(UserError, match="MODEL.MGD.TEACHER 'weights [0-9a-f]{16}', .*'weights [0-9a-f]{16}'"):
        hooks[1].load_state_dict(state)
    hooks[2].load_state_dict(state)
