"""What a step does with losses and gradients, above all with those that are not finite."""

import copy
import json
import logging
import math

import pytest
import torch
import toy
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mgd_det.checkpoint.finite import non_finite_tensors
from mgd_det.engine import Trainer
from mgd_det.engine.non_finite import NonFiniteError, NonFinitePolicy
from mgd_det.engine.training_step import TrainStep
from mgd_det.errors import ArgumentError

NAN, INF = math.nan, math.inf
SKIP = NonFinitePolicy("skip", 3)


class Net(nn.Module):
    """Two losses of a batch of {"image": (3, 4, 4), "file_name", "factor": of the first loss}."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), norm(4)
        self.loss_normalizer = 100.0

    def forward(self, batch):
        self.loss_normalizer += 1
        x = self.norm(self.conv(torch.stack([image["image"] for image in batch]).to(self.conv.weight)))
        # The square root of 0 has an infinite slope: a gradient that is not finite under a loss that is.
        slope = sum((x.sum() * 0).square().sqrt() for image in batch if image.get("steep"))
        factors = torch.tensor([image.get("factor", 1.0) for image in batch])
        return {"loss_a": (x.square().mean((1, 2, 3)) * factors).mean() + slope, "loss_b": x.abs().mean()}


class GroupNet(Net):
    """No norm over the batch, and a loss that is a plain mean over images."""

    def __init__(self):
        super().__init__(lambda channels: nn.GroupNorm(2, channels))


def images(seed, size=2, **changes):
    generator = torch.Generator().manual_seed(seed)
    made = [{"image": torch.randn(3, 4, 4, generator=generator), "file_name": f"{seed}-{i}.jpg"} for i in range(size)]
    made[-1].update(changes)
    return made


GOOD = [images(seed) for seed in range(12)]


def made(batches, model=None, **options):
    model = Net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return TrainStep(model, batches, optimizer, **options)


def run(trainer, steps):
    """The storage of ``steps`` steps from iteration 0 on; the training fails where it ends earlier."""
    trainer.train(0, steps)
    return trainer.storage


def state(trainer):
    return copy.deepcopy([trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]])


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_finite_step_is_detectron2s():
    ours, theirs = made(GOOD), SimpleTrainer(model := Net(), GOOD, torch.optim.SGD(model.parameters(), 0.05, 0.9))
    scalars = [run(trainer, 4).latest() for trainer in (ours, theirs)]
    assert_equal(state(ours), state(theirs))
    assert scalars[0].keys() == scalars[1].keys() >= {"total_loss", "loss_a", "loss_b", "data_time"}
    assert {k: v for k, v in scalars[0].items() if "loss" in k} == {k: v for k, v in scalars[1].items() if "loss" in k}
    ours.load_state_dict(theirs.state_dict())  # a checkpoint of Detectron2's own trainer


@pytest.mark.parametrize("factor", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(factor):
    trainer = made([*GOOD[:2], images(7, factor=factor), *GOOD])
    run(trainer, 2)
    before = state(trainer)[0]
    trainer.iter = 2
    with EventStorage(2), pytest.raises(NonFiniteError) as error:
        trainer.run_step()
    said = str(error.value)
    assert "Loss became infinite or NaN at iteration=2\n" in said and "rank" not in said
    assert f"loss_a={factor}" in said and "loss_b=0." in said and "images: 7-0.jpg, 7-1.jpg" in said
    for name, parameter in trainer.model.named_parameters():
        assert_equal(parameter.data, before[name])


@pytest.mark.parametrize("old_torch", [False, True])
def test_a_gradient_that_is_not_finite_under_a_loss_that_is(old_torch, monkeypatch):
    if old_torch:  # < 2.6
        monkeypatch.delattr(nn.utils, "get_total_norm", raising=False)
    trainer = made([images(3, steep=True)])
    before = state(trainer)[0]
    with pytest.raises(NonFiniteError) as error:
        run(trainer, 1)
    said = str(error.value)
    assert "Gradient became infinite or NaN at iteration=0" in said and "images: 3-0.jpg, 3-1.jpg" in said
    assert "gradient of conv.weight, gradient of conv.bias, gradient of norm.weight and 1 more" in said
    assert_equal(trainer.model.conv.weight.data, before["conv.weight"])


POISON = [
    {"factor": NAN},
    {"steep": True},
    {"image": torch.full((3, 4, 4), NAN)},  # spoils the running statistics, too
    {"image": torch.full((3, 4, 4), 1e30)},  # a variance that overflows, under a finite loss and gradient
]


@pytest.mark.parametrize("poison", POISON)
def test_a_skipped_step_leaves_no_trace(poison, caplog):
    trainer, without = made([*GOOD[:2], images(7, **poison), *GOOD[2:4]], non_finite=SKIP), made(GOOD)
    with caplog.at_level(logging.WARNING, "mgd_det"):
        storage = run(trainer, 5)
    run(without, 4)
    assert_equal(state(trainer), state(without))
    assert trainer.model.loss_normalizer == 104
    assert trainer.skipped_steps == 1 and storage.history("skipped_steps").values() == [(1, 2)]
    assert [i for _, i in storage.history("total_loss").values()] == [0, 1, 3, 4]
    (record,) = [r for r in caplog.records if r.name.startswith("mgd_det")]
    assert "Step skipped, 1 in a row (limit 3), 1 in all." in record.getMessage() and "7-1.jpg" in record.getMessage()


def test_a_first_step_that_is_skipped():
    trainer = made([images(7, **POISON[2]), *GOOD], non_finite=SKIP)
    run(trainer, 2)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_so_many_in_a_row_stop_the_training_also_over_a_resume():
    bad = images(7, factor=NAN)
    trainer = made([bad, bad, GOOD[0], bad, bad, GOOD[1], bad, bad], non_finite=SKIP)
    run(trainer, 8)
    assert trainer.skipped_steps == 6
    resumed = made([bad], non_finite=SKIP)
    resumed.load_state_dict(trainer.state_dict())
    with pytest.raises(NonFiniteError, match="iteration=8\n.*\nThe 2 steps before were skipped for the same"):
        resumed.train(8, 9)
    assert resumed.skipped_steps == 6


def test_a_forward_that_ends_for_it(monkeypatch):
    """As that of Detectron2's RPN does, and its Boxes."""

    def ending(model, error):
        forward = model.forward

        def ends(batch):
            if any("bad" in image for image in batch):
                raise error
            return forward(batch)

        model.forward = ends
        return model

    batches = [GOOD[0], images(7, bad=True), GOOD[1]]
    for error in (FloatingPointError("diverged"), AssertionError("Box tensor contains infinite or NaN!")):
        trainer, without = made(batches, ending(Net(), error), non_finite=SKIP), made(GOOD)
        run(trainer, 3), run(without, 2)
        assert_equal(state(trainer), state(without))
        with pytest.raises(NonFiniteError, match=f"iteration=1\n{error}; images: 7-0.jpg, 7-1.jpg"):
            run(made(batches, ending(Net(), error)), 3)
    with pytest.raises(AssertionError, match="a bug"):
        run(made(batches, ending(Net(), AssertionError("a bug")), non_finite=SKIP), 3)


# ---------------------------------------------------------------------- accumulation
def test_accumulated_gradients_are_those_of_one_large_batch():
    small = [images(seed, size=2) for seed in range(6)]
    large = [[*small[i], *small[i + 1], *small[i + 2]] for i in (0, 3)]
    accumulating, whole = made(small, GroupNet(), accumulate=3), made(large, GroupNet())
    assert accumulating.batches_per_iteration == 3 and whole.batches_per_iteration == 1
    storages = [run(trainer, 2) for trainer in (accumulating, whole)]
    torch.testing.assert_close(state(accumulating), state(whole))
    for name in ("loss_a", "loss_b", "total_loss"):
        values = [[value for value, _ in storage.history(name).values()] for storage in storages]
        assert len(values[0]) == 2 and values[0] == pytest.approx(values[1])


def test_a_skipped_step_uses_up_all_of_its_batches():
    def fails(batch):
        if batch[0]["file_name"] == "7-0.jpg":
            raise FloatingPointError("diverged")
        return forward(batch)

    taken = []
    batches = (taken.append(1) or batch for batch in [GOOD[0], images(7), *GOOD])
    trainer = made(batches, GroupNet(), accumulate=3, non_finite=SKIP)
    forward, trainer.model.forward = trainer.model.forward, fails
    trainer.iter = 0
    with EventStorage():
        for step in (1, 2):
            trainer.run_step()
            assert len(taken) == 3 * step
    assert trainer.skipped_steps == 1


def test_one_bad_batch_of_several_names_the_images_of_all():
    with pytest.raises(NonFiniteError, match="0-0.jpg, 0-1.jpg, 7-0.jpg, 7-1.jpg, 1-0.jpg, 1-1.jpg$"):
        run(made([GOOD[0], images(7, factor=NAN), GOOD[1]], accumulate=3), 1)


@pytest.mark.parametrize(
    "options, message", [({"accumulate": 0}, "^accumulate is 0"), ({"accumulate": 1.5}, "^accumulate is 1.5")]
)
def test_invalid_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        made(GOOD, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ignore",), "^policy is 'ignore'; .* stop, skip"),
        (("skip", 0), "^max_in_a_row is 0"),
    ],
)
def test_invalid_policies(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        NonFinitePolicy(*arguments)


# ---------------------------------------------------------------------- mixed precision
def test_an_overflow_of_scaled_gradients_is_the_scalers():
    trainer = made([images(7, factor=1e30), *GOOD], GroupNet(), amp=True)
    weights = state(trainer)[0]
    run(trainer, 1)
    assert_equal(state(trainer)[0], weights)
    assert trainer.grad_scaler.get_scale() == 65536 / 2 and trainer.skipped_steps == 0
    resumed = made(GOOD, GroupNet(), amp=True)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.grad_scaler.get_scale() == 65536 / 2
    resumed.load_state_dict({k: v for k, v in trainer.state_dict().items() if k != "grad_scaler"})
    run(trainer, 10)
    assert (trainer.model.conv.weight != weights["conv.weight"]).all()


def test_under_mixed_precision_the_policy_holds_for_losses_and_at_a_scale_of_1():
    trainer = made([images(7, factor=NAN)], GroupNet(), non_finite=SKIP, amp=True)
    run(trainer, 1)
    assert trainer.skipped_steps == 1 and trainer.grad_scaler.get_scale() == 65536
    endless = made([images(7, steep=True)] * 20, GroupNet(), amp=True)
    with pytest.raises(NonFiniteError, match="Gradient became infinite or NaN at iteration=16"):
        run(endless, 20)


# ---------------------------------------------------------------------- a detector
class OnBatches(Trainer):
    """Trains on batches that it is given."""

    batches = ()

    @classmethod
    def build_train_loader(cls, cfg):
        return cls.batches


@pytest.mark.slow
@pytest.mark.parametrize("base", [toy.RETINANET, toy.RCNN])
def test_a_distilled_detector_gets_over_an_image_of_nan(base, tmp_path, monkeypatch):
    """The R-CNN's forward ends in its RPN, between the backbone and the logits that are distilled."""
    opts = ["SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()", "SOLVER.BASE_LR", 1e-4, "DATASETS.TEST", "()"]
    opts += ["SOLVER.NON_FINITE.POLICY", "skip", "MODEL.MGD.LOGITS.WEIGHT", 1.0, "OUTPUT_DIR", str(tmp_path)]
    opts += ["MODEL.MGD.MATCHING.PERIODS", "[100]", "SEED", 3]
    cfg = toy.distilled_config(toy.save_teacher(tmp_path / "teacher.pth", base), base, opts=opts)
    batches = [toy.batch(seed=seed) for seed in range(4)]
    batches[2][1]["image"] = torch.full((3, 64, 64), NAN)
    monkeypatch.setattr(OnBatches, "batches", batches)
    trainer = OnBatches(cfg)
    trainer.train()
    written = {}
    for line in (tmp_path / "metrics.json").read_text().splitlines():
        written.update(json.loads(line))
    assert written["skipped_steps"] == 1 and all(math.isfinite(value) for value in written.values())
    assert [iteration for _, iteration in trainer.storage.history("loss_kd_logits").values()] == [0, 1, 3]
    saved = torch.load(tmp_path / "model_final.pth")
    assert non_finite_tensors(saved) == [] and saved["trainer"]["_trainer"]["skipped_steps"] == 1


# ---------------------------------------------------------------------- several ranks
def test_two_ranks_skip_and_stop_together(run_ranks):
    union = [[*images(seed), *images(seed + 10)] for seed in range(3)]
    poisoned = [union[0], [*images(5), *images(7, factor=NAN)], union[1], [*images(6), *images(8, factor=INF)]]

    def mine(rank, batches):
        return [batch[:2] if rank == 0 else batch[2:] for batch in batches]

    def rank_train(rank):
        skipping = made(mine(rank, poisoned), DistributedDataParallel(GroupNet()), non_finite=SKIP)
        run(skipping, 3)
        stopping = made(mine(rank, poisoned[2:]), DistributedDataParallel(GroupNet()))
        with pytest.raises(NonFiniteError) as error:
            run(stopping, 2)
        accumulating = made(mine(rank, union[:2]), DistributedDataParallel(GroupNet()), accumulate=2)
        run(accumulating, 1)
        return [state(skipping)[0], skipping.skipped_steps, str(error.value), state(accumulating)[0]]

    first, second = run_ranks(rank_train, 2)
    assert first[1:3] == second[1:3] == [1, first[2]]
    lines = first[2].splitlines()
    assert lines[0] == "Loss became infinite or NaN at iteration=1" and len(lines) == 2
    assert lines[1].startswith("rank 1: loss_a=inf, loss_b=0.") and lines[1].endswith("images: 8-0.jpg, 8-1.jpg")
    alone, at_once = made(union, GroupNet()), made([union[0] + union[1]], GroupNet())
    run(alone, 2), run(at_once, 1)
    for ranks in (first, second):
        for name, value in alone.model.state_dict().items():
            torch.testing.assert_close(ranks[0][f"module.{name}"], value)
            torch.testing.assert_close(ranks[3][f"module.{name}"], at_once.model.state_dict()[name])


def test_a_training_after_a_stopped_one_is_not_stopped():
    trainer = made(GOOD)
    trainer.request_stop()
    assert trainer.stop_agreed
    trainer.forget_stop()
    assert not trainer.stop_agreed
