"""The list of hooks that both trainers register."""

import pytest
import torch
from detectron2.engine import hooks
from detectron2.utils import comm
from torch import nn

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.evaluation import EvaluationHook
from mgd_det.engine.hooks.random_state import RandomState
from mgd_det.engine.training_hooks import training_hooks
from mgd_det.engine.training_step import TrainStep


class Logged(hooks.HookBase):
    """Stands for a hook that only some trainings have, and notes what has happened before it."""

    def __init__(self, happened, what):
        self.happened, self.what = happened, what

    def after_step(self):
        self.happened.append(self.what)


class Net(nn.Linear):
    def forward(self, batch):
        return super().forward(torch.ones(1, 1)).mean()


@pytest.mark.parametrize("is_main", [True, False])
def test_one_list_on_every_rank_but_for_the_writers(tmp_path, monkeypatch, is_main):
    happened = []
    model = Net(1, 1)
    step = TrainStep(model, range(9), torch.optim.SGD(model.parameters(), lr=1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(step.optimizer, 1, gamma=0.5)
    checkpointer = TrainingCheckpointer(model, str(tmp_path), trainer=step)
    monkeypatch.setattr(comm, "is_main_process", lambda: is_main)
    made = training_hooks(
        step,
        random_state=RandomState(3),
        checkpoints=CheckpointHook(checkpointer, period=1),
        evaluation=EvaluationHook(
            1, lambda: happened.append(["evaluation", *sorted(p.name for p in tmp_path.iterdir())])
        ),
        build_writers=lambda: [],
        log_period=7,
        scheduler=scheduler,
        matching=Logged(happened, "matching"),
        precise_bn=Logged(happened, "precise BN"),
    )
    writers = [hook for hook in made if isinstance(hook, hooks.PeriodicWriter)]
    assert [writer._period for writer in writers] == ([7] if is_main else []) and made[-1:] == (writers or made[-1:])
    assert isinstance(made[0], RandomState) and "IterationTimer LRScheduler" in " ".join(type(h).__name__ for h in made)
    step.register_hooks(made)
    step.train(0, 2)
    saved = ["last_checkpoint", "model_0000000.pth"]
    final = ["last_checkpoint", "model_0000000.pth", "model_0000001.pth", "model_final.pth"]
    between = ["matching", "precise BN"]
    assert happened == [*between, ["evaluation", *saved], *between, ["evaluation", *final]]
    assert step.optimizer.param_groups[0]["lr"] == 0.25


def test_what_a_training_has_not_is_left_out(tmp_path):
    model = Net(1, 1)
    step = TrainStep(model, range(9), torch.optim.SGD(model.parameters(), lr=1.0))
    checkpoints = CheckpointHook(TrainingCheckpointer(model, str(tmp_path)), period=1)
    evaluation = EvaluationHook(0, dict)
    made = training_hooks(
        step, random_state=RandomState(3), checkpoints=checkpoints, evaluation=evaluation, build_writers=list
    )
    assert None not in made and len(made) == 8
