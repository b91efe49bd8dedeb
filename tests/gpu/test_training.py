"""Whole detectors on a GPU: steps in every precision, the teacher's options, matching sources, resuming, averages."""

import numpy as np
import pytest
import torch
import toy
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from gpu_check.measuring import host_waits
from torch.optim.swa_utils import AveragedModel

from mgd_det.data import register_coco_folder
from mgd_det.distillation import distiller as distiller_module
from mgd_det.engine import MatchingUpdate, Trainer
from mgd_det.engine.training_step import TrainStep
from mgd_det.modeling import attach_losses, find_distillation

pytestmark = pytest.mark.gpu

SIZES = ((64, 64), (64, 96))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return toy.save_teacher(tmp_path_factory.mktemp("teacher") / "retinanet.pth")


@pytest.fixture(scope="module")
def rcnn_weights(tmp_path_factory):
    return toy.save_teacher(tmp_path_factory.mktemp("teacher") / "rcnn.pth", toy.RCNN)


def build(weights, device, base=toy.RETINANET, opts=(), solve=True):
    torch.manual_seed(0)
    # On the CPU first, so that the weights are equal on any device.
    cfg = toy.distilled_config(weights, base, opts=["MODEL.DEVICE", "cpu", *opts])
    detector = build_model(cfg)
    toy.randomize_norms(detector)
    detector.to(device)
    attach_losses(detector)
    if solve:
        toy.solve_matching(detector)
    return detector.train()


def losses_of(detector):
    torch.manual_seed(0)
    with EventStorage():
        return detector(toy.batch(SIZES))


def gradients_are_finite(detector):
    learning = [p for p in detector.parameters() if p.requires_grad]
    return all(p.grad is not None and p.grad.isfinite().all() for p in learning)


def test_losses_are_those_of_the_cpu(device, exact, weights):
    on_cpu, on_gpu = (losses_of(build(weights, place)) for place in ("cpu", device))
    assert list(on_gpu) == list(on_cpu) and any("mgd" in name for name in on_cpu)
    for name, loss in on_gpu.items():
        assert loss.device.type == device.type
        torch.testing.assert_close(loss.detach().cpu(), on_cpu[name].detach(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("base", [toy.RETINANET, toy.RCNN], ids=["retinanet", "mask_rcnn"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_in_mixed_precision(device, weights, rcnn_weights, base, dtype):
    if device.type == "cpu" and dtype == torch.float16 and base == toy.RCNN:
        pytest.skip("RoI align has no float16 on a CPU")
    detector = build(rcnn_weights if base == toy.RCNN else weights, device, base)
    plain = losses_of(detector)
    with torch.autocast(device.type, dtype):
        mixed = losses_of(detector)
    scale = 128.0 if dtype == torch.float16 else 1.0
    (scale * sum(mixed.values())).backward()
    assert gradients_are_finite(detector)
    assert list(mixed) == list(plain)
    for name in (name for name in mixed if "mgd" in name):
        assert mixed[name].dtype == torch.float32
        torch.testing.assert_close(mixed[name], plain[name], rtol=0.1, atol=1e-4)


def test_the_training_step_with_a_scaler(device, weights):
    detector = build(weights, device)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    step = TrainStep(
        detector, [toy.batch(SIZES, seed=i) for i in range(3)], torch.optim.SGD(detector.parameters(), 1e-4), amp=True
    )
    step.grad_scaler = torch.amp.GradScaler(device.type, init_scale=128.0)
    step.train(0, 3)
    assert step.skipped_steps == 0
    changed = [name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("backbone.bottom_up.res2") for name in changed)
    assert all(value.isfinite().all() for value in detector.state_dict().values())


@pytest.mark.parametrize(
    "options, tolerance",
    [
        (["FOLD_NORM", "True"], 1e-3),
        (["CHANNELS_LAST", "True"], 1e-3),
        (["DTYPE", "bfloat16", "CHANNELS_LAST", "True"], 0.1),
        (["DTYPE", "float16"], 0.02),
    ],
    ids=["folded", "channels_last", "bfloat16", "float16"],
)
def test_the_teachers_options(device, exact, weights, options, tolerance):
    if device.type == "cpu" and "float16" in options:
        pytest.skip("float16 is refused on a CPU")
    opts = [f"MODEL.MGD.TEACHER.{text}" if i % 2 == 0 else text for i, text in enumerate(options)]
    plain = build(weights, device, opts=["MODEL.MGD.TEACHER.FOLD_NORM", "False"])
    other = build(weights, device, opts=opts)
    images = plain.preprocess_image(toy.batch(SIZES)).tensor
    expected = find_distillation(plain).teacher(images)
    for name, feature in find_distillation(other).teacher(images).items():
        error = (feature.float() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < tolerance, name
    losses = losses_of(other)
    sum(losses.values()).backward()
    assert gradients_are_finite(other)


@pytest.mark.parametrize("source", ["online", "measured"])
def test_matching_sources(device, weights, source):
    detector = build(weights, device, solve=False)
    batches = [toy.batch(SIZES, seed=i) for i in range(6)]
    step = TrainStep(detector, batches, torch.optim.SGD(detector.parameters(), lr=1e-4))
    hook = MatchingUpdate(detector, lambda: batches[:2], source=source, num_batches=2, periods=[3])
    distiller, seen = find_distillation(detector).distiller, []
    distiller.register_forward_pre_hook(
        lambda *_: seen.append({p.name: distiller.groups(p).clone() for p in positions})
    )
    positions = distiller.positions
    step.register_hooks([hook])
    step.train(0, 6)
    assert distiller.is_matched and len(seen) == 6
    for p in positions:
        groups = distiller.groups(p)
        assert groups.device.type == device.type
        taken = groups.flatten().tolist()
        assert len(set(taken)) == len(taken) == p.student_channels * distiller.group_size(p) and min(taken) >= 0
        assert not torch.equal(seen[0][p.name], seen[-1][p.name])


def test_a_resumed_training_goes_on(device, weights, tmp_path):
    _, train_json, _, train_images, *_ = toy.write_scenes(tmp_path / "toy")
    register_coco_folder("gpu_train", train_json, train_images)
    opts = ["DATASETS.TRAIN", "('gpu_train',)", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2", "SEED", "5"]
    opts += ["SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.0005", "SOLVER.CHECKPOINT_PERIOD", "2"]
    opts += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", device.type]
    opts += ["MODEL.MGD.MATCHING.NUM_BATCHES", "2", "MODEL.MGD.MATCHING.PERIODS", "[100]"]
    cfg = toy.distilled_config(weights, opts=opts)
    try:
        Trainer(cfg).train()
        whole = torch.load(tmp_path / "model_final.pth", map_location="cpu")
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
        resumed = Trainer(cfg)
        resumed.resume_or_load(resume=True)
        assert resumed.start_iter == 2 and next(resumed.model.parameters()).device.type == device.type
        resumed.train()
    finally:
        DatasetCatalog.remove("gpu_train")
    again = torch.load(tmp_path / "model_final.pth", map_location="cpu")
    assert whole["model"].keys() == again["model"].keys()
    for key, value in whole["model"].items():
        torch.testing.assert_close(again["model"][key], value, rtol=1e-2, atol=1e-3)
    matchings = [of["trainer"]["hooks"]["MatchingUpdate"]["matchings"] for of in (whole, again)]
    for name, matching in matchings[0].items():
        # Convolutions on a GPU differ in their last bits from run to run, and near ties with them.
        same = (matching["groups"] == matchings[1][name]["groups"]).float().mean()
        assert same > 0.8


def test_an_average_of_the_weights(device, weights):
    """As EMA makes it: a copy of the detector, beside it."""
    detector = build(weights, device)
    average = AveragedModel(detector, multi_avg_fn=_mean_of_both, use_buffers=False)
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    key = "backbone.bottom_up.res2.0.conv1.weight"
    values = []
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses_of(detector).values()).backward()
        optimizer.step()
        average.update_parameters(detector)
        values.append(detector.state_dict()[key].clone())
    assert average.module.state_dict().keys() == detector.state_dict().keys()
    torch.testing.assert_close(average.module.state_dict()[key], (values[0] + values[1]) / 2)
    copied = losses_of(average.module)
    assert {name for name in copied if "mgd" in name} == {name for name in losses_of(detector) if "mgd" in name}


def _mean_of_both(averages, values, number):
    for average, value in zip(averages, values):
        average.copy_((average + value) / 2)


def test_distillation_adds_no_host_wait(device, weights):
    detector = build(weights, device)
    plain = build_model(toy.plain_config(opts=["MODEL.DEVICE", "cpu"])).to(device).train()
    batch = [{**image, "image": image["image"].to(device)} for image in toy.batch(SIZES)]
    for image in batch:
        image["instances"] = image["instances"].to(device)

    def step(model):
        with EventStorage():
            sum(model(batch).values()).backward()

    waits = [host_waits(lambda model=model: step(model), device) for model in (plain, detector)]
    if device.type == "cpu":
        assert waits == [None, None]
    else:
        assert waits[1] <= waits[0]


def test_the_losses_are_computed_on_the_gpu(device, weights, monkeypatch):
    seen = []
    forward = distiller_module.Distiller.forward

    def recorded(self, student, teacher, **kwargs):
        seen.extend([*student.values(), *teacher.values(), *self.buffers(), *self.parameters()])
        return forward(self, student, teacher, **kwargs)

    monkeypatch.setattr(distiller_module.Distiller, "forward", recorded)
    losses_of(build(weights, device))
    assert seen and {x.device.type for x in seen} == {device.type}
    assert np.isfinite([float(x.detach().float().sum()) for x in seen]).all()
