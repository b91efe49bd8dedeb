"""The average of the weights: its numbers, its evaluation, its file, and its state over a resume."""

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.distributed.ranks import distributed
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.ema import EMAHook, evaluate_both
from mgd_det.engine.hooks.evaluation import EvaluationHook
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import unwrapped


class Net(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.frozen = FrozenBatchNorm2d(width)

    def forward(self, images):
        return {"loss": (self.frozen(self.norm(self.conv(images))) - 1).square().mean()}


class Recording(HookBase):
    """The weights after each step."""

    def __init__(self, model):
        self.model, self.weights = model, []

    def after_step(self):
        self.weights.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})


class Batches:
    """Batch i is always the same, also after a resume, and different on each rank."""

    def __init__(self, rank=0):
        self.number, self.rank = 0, rank

    def __iter__(self):
        return self

    def __next__(self):
        generator = torch.Generator().manual_seed(self.number + 1000 * self.rank)
        self.number += 1
        return torch.rand(2, 3, 4, 4, generator=generator)


class Run:
    def __init__(self, folder, iterations, period=2, rank=0, evaluate=None, with_ema=True, **options):
        self.model = distributed(Net())
        self.batches = Batches(rank)
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.trainer = SimpleTrainer(self.model, self.batches, sgd)
        folder.mkdir(exist_ok=True)
        self.checkpointer = TrainingCheckpointer(self.model, str(folder), trainer=self.trainer)
        self.ema = EMAHook(self.checkpointer, iterations, **options) if with_ema else None
        self.recording = Recording(unwrapped(self.model))
        hooks = [self.recording, self.ema, CheckpointHook(self.checkpointer, period)]
        if evaluate is not None:
            hooks.append(EvaluationHook(1, lambda: evaluate_both(lambda: evaluate(self.model), self.ema)))
        self.trainer.register_hooks([hook for hook in hooks if hook is not None])
        self.iterations = iterations

    def train(self, resume=False):
        self.checkpointer.resume_or_load("", resume=resume)
        start = self.trainer.iter + 1 if self.checkpointer.resumed_from else 0
        self.batches.number = start
        self.trainer.train(start, self.iterations)
        return self


def averaged(weights, decay, name):
    """The average by numpy, in float64, of one tensor of the weights after each step."""
    average = weights[0][name].double().numpy()
    for number, tensors in enumerate(weights[1:], start=1):
        d = min(decay, (1 + number) / (10 + number))
        average = d * average + (1 - d) * tensors[name].double().numpy()
    return average


@pytest.mark.parametrize("decay, start", [(0.999, 0), (0.25, 0), (0.5, 3)])
def test_the_average_is_numpys(tmp_path, decay, start):
    run = Run(tmp_path, 7, decay=decay, start=start).train()
    weights = run.recording.weights[start:]
    for name in ("conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        expected = averaged(weights, decay, name)
        np.testing.assert_allclose(run.ema.weights[name].numpy(), expected, rtol=1e-5, atol=1e-7)
        assert not np.allclose(expected, weights[-1][name].numpy(), rtol=5e-5, atol=1e-6), (
            name
        )  # so that the test can fail
    assert run.ema.weights["norm.num_batches_tracked"] == 7
    for name, tensor in FrozenBatchNorm2d(2).state_dict().items():
        assert torch.equal(run.ema.weights[f"frozen.{name}"], tensor)


def test_its_file_is_a_plain_checkpoint_beside_the_last_one(tmp_path):
    run = Run(tmp_path, 4).train()
    file = torch.load(tmp_path / "model_ema.pth", weights_only=True)
    assert sorted(file) == ["iteration", "model"] and file["iteration"] == 3
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert list(file["model"]) == list(final["model"]) == list(Net().state_dict())
    assert all(torch.equal(file["model"][name], tensor) for name, tensor in run.ema.weights.items())
    assert not torch.equal(file["model"]["conv.weight"], final["model"]["conv.weight"])
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"  # which --resume takes


def test_both_are_evaluated_and_the_model_goes_on_with_its_own(tmp_path):
    seen = []

    def evaluate(model):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen.append(state)
        return {"bbox": {"AP": float(state["conv.weight"].sum())}}

    run = Run(tmp_path, 5, evaluate=evaluate, start=2).train()
    weights = run.recording.weights
    # Iterations 0 and 1 are before the average; then the average comes first, and the model's own last.
    assert len(seen) == 2 + 3 * 2
    for own, expected in zip([seen[0], seen[1], seen[3], seen[5], seen[7]], weights):
        assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(seen[6][name], tensor) for name, tensor in run.ema.weights.items())
    scores = {name: value for name, (value, _) in run.trainer.storage.latest().items()}
    assert scores["bbox/AP"] == pytest.approx(float(weights[-1]["conv.weight"].sum()), abs=1e-6)
    assert scores["ema/bbox/AP"] == pytest.approx(averaged(weights[2:], 0.999, "conv.weight").sum(), abs=1e-5)
    # The evaluations change nothing: training ends as one without them.
    plain = Run(tmp_path / "plain", 5, with_ema=False).train()
    assert all(torch.equal(tensor, weights[-1][name]) for name, tensor in plain.model.state_dict().items())


def test_an_evaluation_that_fails_gives_the_model_its_weights_back(tmp_path):
    run = Run(tmp_path, 3).train()
    with pytest.raises(RuntimeError, match="no disk"), run.ema.applied():
        assert torch.equal(run.model.conv.weight, run.ema.weights["conv.weight"])
        raise RuntimeError("no disk")
    assert all(torch.equal(tensor, run.recording.weights[-1][n]) for n, tensor in run.model.state_dict().items())


class FreshStatistics(HookBase):
    """Gives the model other tensors, as Detectron2's PreciseBN does every few iterations."""

    def __init__(self, norm):
        self.norm = norm

    def after_step(self):
        self.norm.running_mean = torch.full((2,), float(self.trainer.iter))
        self.norm.running_var = torch.full((2,), 1.0 + self.trainer.iter)


def test_statistics_that_a_hook_replaces_are_averaged_and_evaluated(tmp_path):
    seen = []

    def evaluate(model):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"bbox": {"AP": 0.0}}

    run = Run(tmp_path, 4, evaluate=evaluate)
    run.trainer._hooks.insert(0, FreshStatistics(unwrapped(run.model).norm))
    run.trainer._hooks[0].trainer = run.trainer
    run.train()
    for name in ("norm.running_mean", "norm.running_var"):
        expected = averaged(run.recording.weights, 0.999, name)
        assert expected[0] < run.recording.weights[-1][name][0]
        np.testing.assert_allclose(seen[-2][name].numpy(), expected, rtol=1e-5)  # the average's evaluation
        assert torch.equal(seen[-1][name], run.recording.weights[-1][name])  # the model's own, after it


def test_without_scores_there_is_nothing_to_add(tmp_path):
    run = Run(tmp_path, 2).train()
    assert evaluate_both(lambda: None, run.ema) is None and evaluate_both(dict, run.ema) == {}


@pytest.mark.parametrize("start", [0, 4])
def test_a_resumed_training_ends_with_equal_tensors(tmp_path, start):
    whole = Run(tmp_path / "whole", 8, decay=0.9, start=start).train()
    Run(tmp_path / "cut", 8, decay=0.9, start=start).train()
    for name in ("model_final.pth", "model_ema.pth", "model_0000005.pth", "model_0000007.pth"):
        (tmp_path / "cut" / name).unlink()
    (tmp_path / "cut" / "last_checkpoint").write_text("model_0000003.pth")
    resumed = Run(tmp_path / "cut", 8, decay=0.9, start=start).train(resume=True)
    assert resumed.trainer.start_iter == 4
    assert resumed.ema._updates == whole.ema._updates == 7 - start
    files = [torch.load(tmp_path / folder / "model_ema.pth", weights_only=True) for folder in ("whole", "cut")]
    assert all(torch.equal(files[0]["model"][name], tensor) for name, tensor in files[1]["model"].items())


def test_a_checkpoint_without_an_average_starts_one_and_says_so(tmp_path, caplog):
    Run(tmp_path, 4, with_ema=False).train()
    run = Run(tmp_path, 6).train(resume=True)
    assert "no averaged weights (SOLVER.EMA, train.ema): the average starts at iteration 4" in caplog.text
    expected = averaged(run.recording.weights, 0.999, "conv.weight")
    np.testing.assert_allclose(run.ema.weights["conv.weight"].numpy(), expected, rtol=1e-5)


def test_a_training_whose_average_has_not_begun_warns_of_nothing(tmp_path, caplog):
    Run(tmp_path, 4, start=3).train()
    for name in ("model_final.pth", "model_0000003.pth"):
        (tmp_path / name).unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    Run(tmp_path, 4, start=3).train(resume=True)
    assert "no averaged weights" not in caplog.text


def test_the_average_of_another_network_is_refused(tmp_path):
    run = Run(tmp_path, 2).train()
    state = run.ema.state_dict()
    state["average"] = Net(width=3).state_dict()
    with pytest.raises(ValueError, match="EMA"):
        run.ema.load_state_dict(state)


def test_two_ranks_have_one_average_and_one_file(tmp_path, run_ranks):
    def rank_train(rank):
        seen = []
        run = Run(tmp_path, 4, rank=rank, evaluate=lambda m: seen.append(rank) or {"bbox": {"AP": 1.0 + rank}}).train()
        latest = run.trainer.storage.latest()
        return run.ema.weights, run.recording.weights, latest["ema/bbox/AP"], len(seen)

    (first, weights, *scores), (second, _, *others) = run_ranks(rank_train, 2)
    assert scores == others and scores[1] == 8 and scores[0][0] == 1.0  # rank 0's
    for name in ("conv.weight", "norm.weight", "norm.bias"):
        assert torch.equal(first[name], second[name])
        np.testing.assert_allclose(first[name].numpy(), averaged(weights, 0.999, name), rtol=1e-5, atol=1e-7)
    assert not torch.equal(first["norm.running_mean"], second["norm.running_mean"])  # of each rank's images
    file = torch.load(tmp_path / "model_ema.pth", weights_only=True)["model"]
    assert list(file) == list(Net().state_dict())
    assert all(torch.equal(file[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decay": 1}, "^decay is 1;"),
        ({"decay": 0.0}, "^decay is 0.0;"),
        ({"decay": "0.9"}, "^decay is '0.9';"),
        ({"decay": float("nan")}, "^decay is nan;"),
        ({"start": -1}, "^start is -1;"),
        ({"start": 4}, "^start is 4; .* 0 to 3"),
        ({"start": 1.5}, "^start is 1.5;"),
    ],
)
def test_impossible_numbers_are_named(tmp_path, options, message):
    with pytest.raises(ArgumentError, match=message):
        Run(tmp_path, 4, **options)


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    run = Run(tmp_path, 2).train()
    (tmp_path / "model_ema.pth").unlink()
    with pytest.raises(UserError, match="model_ema.pth is not written: model.conv.bias"):
        run.checkpointer.save_weights("model_ema", {"conv.bias": torch.tensor([1.0, float("nan")])})
    assert not (tmp_path / "model_ema.pth").exists()
