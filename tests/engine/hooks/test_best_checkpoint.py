"""The file of the best evaluation, over resumes, ranks and disks that are full."""

import errno
import os

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from torch import nn

from mgd_det.checkpoint import CheckpointWriteError, TrainingCheckpointer
from mgd_det.engine.hooks.best_checkpoint import BestCheckpoint
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.ema import EMAHook, evaluate_both
from mgd_det.engine.hooks.evaluation import EvaluationHook
from mgd_det.errors import ArgumentError, UserError

SCORES = [1.0, 5.0, 3.0, 4.0, 6.0, 2.0]  # AP after each step


class Net(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def forward(self, batch):
        return super().forward(torch.ones(1, 1)).sum()


class Run:
    """A training that counts its steps in its weight, and is scored by a list."""

    def __init__(self, folder, iterations=6, scores=SCORES, period=1, metric="bbox/AP", ema=None, saves=2):
        self.model = Net()
        self.scores, self.iterations, self.ema = scores, iterations, None
        self.trainer = SimpleTrainer(self.model, range(99), torch.optim.SGD(self.model.parameters(), lr=1.0))
        folder.mkdir(exist_ok=True)
        self.checkpointer = TrainingCheckpointer(self.model, str(folder), trainer=self.trainer)
        if ema is not None:
            self.ema = EMAHook(self.checkpointer, iterations, **ema)
        best = BestCheckpoint(self.checkpointer, period, self.ema, metric=metric)
        evaluation = EvaluationHook(period, lambda: evaluate_both(self.evaluate, self.ema))
        hooks = [self.ema, CheckpointHook(self.checkpointer, saves), evaluation, best]
        self.trainer.register_hooks([hook for hook in hooks if hook is not None])

    def evaluate(self):
        # EvaluationHook counts the last one after the last step, the others within theirs.
        number = min(self.trainer.iter, self.iterations - 1)
        return {"bbox": {"AP": self.scores[number], "APs": float("nan")}}

    def train(self, resume=False):
        nn.init.zeros_(self.model.weight)
        self.checkpointer.resume_or_load("", resume=resume)
        start = self.trainer.iter + 1 if self.checkpointer.resumed_from else 0
        self.trainer.train(start, self.iterations)
        return self


def best(folder):
    """(score, iteration, steps in the weight) of the file."""
    file = torch.load(folder / "model_best.pth", weights_only=True)
    assert sorted(file) == ["iteration", "metric", "model", "score", "steps"] and list(file["model"]) == [
        "weight",
        "bias",
    ]
    return file["score"], file["iteration"], -file["model"]["weight"].item()


def cut(folder, last):
    """Leaves the checkpoints that a training had which was killed some time after iteration ``last``."""
    (folder / "last_checkpoint").write_text(f"model_{last:07d}.pth")
    (folder / "model_final.pth").unlink(missing_ok=True)
    for path in folder.glob("model_0*.pth"):
        if int(path.stem[6:]) > last:
            path.unlink()


def test_the_highest_score_and_no_checkpoint_to_resume_from(tmp_path):
    Run(tmp_path).train()
    assert best(tmp_path) == (6.0, 4, 5.0)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    Run(tmp_path / "last", scores=[1.0, 2.0, 9.0], iterations=3).train()
    assert best(tmp_path / "last") == (9.0, 3, 3.0)  # the evaluation at the end counts too
    Run(tmp_path / "only last", period=0).train()
    assert best(tmp_path / "only last") == (2.0, 6, 6.0)


@pytest.mark.parametrize("nan", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_never_the_best(tmp_path, nan):
    Run(tmp_path, scores=[nan, 5.0, nan, 4.0, 3.0, nan]).train()
    assert best(tmp_path) == (5.0, 1, 2.0)


@pytest.mark.parametrize("last, first_run", [(1, 2), (1, 3), (3, 4), (1, 5), (3, 6)])
def test_a_resumed_training_ends_with_the_file_of_an_uninterrupted_one(tmp_path, last, first_run):
    # It is killed after ``first_run`` evaluations, and its last checkpoint is of iteration ``last``. The evaluation of
    # that iteration comes after the checkpoint, so only the file can know its score.
    run = Run(tmp_path)
    run.trainer._hooks.append(Kill(first_run))
    run.trainer._hooks[-1].trainer = run.trainer
    with pytest.raises(KeyboardInterrupt):
        run.train()
    cut(tmp_path, last)
    resumed = Run(tmp_path).train(resume=True)
    assert resumed.trainer.start_iter == last + 1
    assert best(tmp_path) == (6.0, 4, 5.0)


def test_an_evaluation_right_after_the_checkpoint_is_done_again(tmp_path):
    run = Run(tmp_path, iterations=12, scores=[9.0] * 12, period=3, saves=5)
    run.trainer._hooks.append(Kill(6))  # after the evaluation of step 6; the checkpoint has 5 steps
    run.trainer._hooks[-1].trainer = run.trainer
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert best(tmp_path) == (9.0, 2, 3.0)
    resumed = Run(tmp_path, iterations=12, scores=[0, 0, 1, 0, 0, 4.0, 0, 0, 3.0, 0, 0, 2.0], period=3, saves=5)
    torch.save({**torch.load(tmp_path / "model_best.pth"), "iteration": 5, "steps": 6}, tmp_path / "model_best.pth")
    resumed.train(resume=True)
    assert resumed.trainer.start_iter == 5
    assert best(tmp_path) == (4.0, 5, 6.0)


class Kill:
    def __init__(self, steps):
        self.steps = steps

    def before_train(self):
        pass

    before_step = after_backward = after_train = before_train

    def state_dict(self):
        return {}

    def after_step(self):
        if self.trainer.iter + 1 == self.steps:
            raise KeyboardInterrupt


def test_the_best_of_before_a_resume_stays(tmp_path):
    Run(tmp_path, iterations=2).train()  # 1, 5
    cut(tmp_path, 1)
    Run(tmp_path, iterations=4).train(resume=True)  # 3, 4
    assert best(tmp_path) == (5.0, 2, 2.0)  # an evaluation at the end has the number of the next iteration


def test_the_file_of_a_later_iteration_or_another_training_is_replaced(tmp_path):
    Run(tmp_path).train()
    cut(tmp_path, 1)
    Run(tmp_path, scores=[1.0, 5.0, 3.0, 4.0, 3.5, 2.0]).train(resume=True)
    assert best(tmp_path) == (4.0, 3, 4.0)  # a training that has no iteration of 6 AP
    Run(tmp_path, scores=[1.0, 1.5, 0.5, 0.5, 0.5, 0.5]).train()
    assert best(tmp_path) == (1.5, 1, 2.0)
    (tmp_path / "model_best.pth").write_bytes(b"torn")
    Run(tmp_path, iterations=7, scores=[0.0] * 6 + [0.5]).train(resume=True)
    assert best(tmp_path) == (0.5, 7, 7.0)


def test_a_score_of_the_average_saves_the_average(tmp_path):
    run = Run(tmp_path, metric="ema/bbox/AP", ema={"decay": 0.5, "start": 1}).train()
    score, iteration, _ = best(tmp_path)
    assert (score, iteration) == (6.0, 4)
    # Steps 2, 3, 4, 5 by numbers of the formula: (1 + n) / (10 + n) of the average.
    average = 2.0
    for n, steps in ((1, 3.0), (2, 4.0), (3, 5.0)):
        decay = (1 + n) / (10 + n)
        average = decay * average + (1 - decay) * steps
    assert best(tmp_path)[2] == pytest.approx(average, abs=1e-6)
    assert run.model.weight.item() == -6.0


def test_all_ranks_decide_alike(tmp_path, run_ranks):
    def rank_train(rank):
        # Only rank 0's scores count.
        run = Run(tmp_path, scores=SCORES if rank == 0 else SCORES[::-1]).train()
        return run.trainer._hooks[-1].best_metric, run.trainer._hooks[-1].best_iter

    assert run_ranks(rank_train, 2) == [(6.0, 4)] * 2
    assert best(tmp_path) == (6.0, 4, 5.0)
    cut(tmp_path, 5)

    def rank_resume(rank):
        run = Run(tmp_path, scores=[0.0] * 8, iterations=8).train(resume=True)
        return run.trainer.start_iter, run.trainer._hooks[-1].best_metric

    assert run_ranks(rank_resume, 2) == [(6, 6.0)] * 2


def test_a_full_disk_costs_one_file_and_not_the_training(tmp_path, monkeypatch, caplog):
    full, save = [True], torch.save

    def save_or_fail(state, f):
        if os.path.basename(f.name).startswith("model_best") and full:
            full.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, f)

    monkeypatch.setattr(torch, "save", save_or_fail)
    Run(tmp_path, scores=[5.0, 4.0, 3.0, 2.0, 1.0, 0.5]).train()
    assert "model_best.pth cannot be written: [Errno 28]" in caplog.text
    assert best(tmp_path) == (4.0, 1, 2.0)  # the first is not counted as saved
    full.append(True)
    with pytest.raises(CheckpointWriteError, match="model_best.pth cannot be written"):
        Run(tmp_path / "end", period=0).train()
    assert (tmp_path / "end" / "model_final.pth").exists()


def test_a_score_that_there_is_not_ends_the_training_at_the_first_evaluation(tmp_path, caplog):
    run = Run(tmp_path, metric="bbox/APP")
    with pytest.raises(
        UserError, match="TEST.BEST.METRIC .*'bbox/APP'.* Did you mean bbox/AP.* gives bbox/AP, bbox/APs"
    ):
        run.train()
    assert run.trainer.iter == 0
    # At the end of a training it is too late for an error.
    Run(tmp_path / "end", metric="bbox/APP", period=0).train()
    assert "TEST.BEST.METRIC (train.best.metric) is 'bbox/APP'" in caplog.text
    assert not (tmp_path / "end" / "model_best.pth").exists()


def test_scores_of_every_task_are_named(tmp_path):
    run = Run(tmp_path, metric="sem_seg/IoU")
    scores = {"sem_seg": {"mIoU": 3.0}, "panoptic_seg": {"PQ": 2.0}}
    evaluation = next(hook for hook in run.trainer._hooks if isinstance(hook, EvaluationHook))
    evaluation._func = lambda: scores

    class OtherScalars(HookBase):
        def after_step(self):
            self.trainer.storage.put_scalar("roi_head/num_fg_samples", 1.0)
            self.trainer.storage.put_scalar("mgd/cost_res3", 1.0, smoothing_hint=False)
            self.trainer.storage.put_scalar("lr", 0.1, smoothing_hint=False)

    run.trainer._hooks.insert(0, OtherScalars())
    run.trainer._hooks[0].trainer = run.trainer
    with pytest.raises(UserError, match="'sem_seg/IoU'.* Did you mean sem_seg/mIoU") as error:
        run.train()
    given = str(error.value).partition("It gives ")[2]
    assert given == "panoptic_seg/PQ, sem_seg/mIoU"


def test_no_check_after_an_error_in_the_last_step(tmp_path):
    run = Run(tmp_path, iterations=2)
    run.trainer._hooks.insert(0, Kill(2))
    run.trainer._hooks[0].trainer = run.trainer
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert best(tmp_path) == (1.0, 0, 1.0)


@pytest.mark.parametrize(
    "metric, message", [("AP", "^metric is 'AP'"), (None, "^metric is None"), ("ema/bbox/AP", "SOLVER.EMA.ENABLED")]
)
def test_impossible_names(tmp_path, metric, message):
    with pytest.raises(ArgumentError, match=message):
        Run(tmp_path, metric=metric)
