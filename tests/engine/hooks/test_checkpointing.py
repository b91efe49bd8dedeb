"""When a training saves, which checkpoints it keeps, and what it does where it cannot save."""

import errno
import os

import pytest
import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from mgd_det.checkpoint import CheckpointWriteError, TrainingCheckpointer
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.errors import ArgumentError, UserError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, batch):
        return {"loss": self.linear(batch).square().mean()}


class Run:
    """A training in a folder; ``train`` resumes where there is a checkpoint."""

    def __init__(self, folder, period=1, **options):
        model = Model()
        self.trainer = SimpleTrainer(model, [torch.ones(1, 3)] * 99, torch.optim.SGD(model.parameters(), lr=0.1))
        self.checkpointer = TrainingCheckpointer(model, str(folder), trainer=self.trainer)
        self.trainer.register_hooks([CheckpointHook(self.checkpointer, period, **options)])

    def train(self, end):
        self.checkpointer.resume_or_load("", resume=True)
        self.trainer.train(self.trainer.iter + 1 if self.checkpointer.resumed_from else 0, end)


def numbers(folder):
    return [int(path.stem[6:]) for path in sorted(folder.glob("model_0*.pth"))]


@pytest.fixture
def disk(monkeypatch):
    """``disk.full_at(names)``: no room for these files."""

    class Disk:
        full = ()

        def full_at(self, *names):
            self.full = names

    disk, save = Disk(), torch.save

    def save_or_fail(state, f):
        if os.path.basename(f.name).partition(".")[0] in disk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, f)

    monkeypatch.setattr(torch, "save", save_or_fail)
    return disk


def test_the_number_kept_holds_over_resumes(tmp_path):
    Run(tmp_path, period=2, max_to_keep=2).train(7)
    assert numbers(tmp_path) == [3, 5]
    for end, kept in ((8, [5, 7]), (9, [5, 7]), (14, [11, 13])):
        Run(tmp_path, period=2, max_to_keep=2).train(end)
        assert numbers(tmp_path) == kept
        assert (tmp_path / "model_final.pth").exists()
    # A smaller number holds from the next checkpoint on.
    Run(tmp_path, period=2, max_to_keep=1).train(16)
    assert numbers(tmp_path) == [15]


@pytest.mark.parametrize("options", [{}, {"max_to_keep": None}, {"max_to_keep": 0}])
def test_all_are_kept(tmp_path, options):
    Run(tmp_path, **options).train(4)
    assert numbers(tmp_path) == [0, 1, 2, 3]


def test_files_of_other_names_and_of_later_iterations_stay(tmp_path):
    others = ["model_0000099.pth", "model_best.pth", "model_final_0000001.pth", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("x")
    run = Run(tmp_path, max_to_keep=1)
    run.trainer.train(0, 3)
    assert numbers(tmp_path) == [2, 99]
    assert all((tmp_path / name).exists() for name in others)


def test_old_ones_go_only_after_the_new_one_is_there(tmp_path, disk):
    disk.full_at("model_0000001")
    run = Run(tmp_path, max_to_keep=1)
    seen = []
    step = run.checkpointer.tag_last_checkpoint
    run.checkpointer.tag_last_checkpoint = lambda name: (step(name), seen.append((name, numbers(tmp_path))))
    run.train(4)
    assert seen == [
        ("model_0000000.pth", [0]),
        ("model_0000002.pth", [0, 2]),
        ("model_0000003.pth", [2, 3]),
        ("model_final.pth", [2, 3]),
    ]
    assert numbers(tmp_path) == [3]


def test_what_cannot_be_removed_is_no_error(tmp_path, caplog):
    (tmp_path / "model_0000000.pth").write_text("x")
    run = Run(tmp_path, max_to_keep=1)
    run.checkpointer.path_manager = type(run.checkpointer.path_manager)()
    (hook,) = run.trainer._hooks
    hook.path_manager = Stubborn()
    run.trainer.train(0, 3)
    assert "model_0000000.pth cannot be removed: [Errno 13]" in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


class Stubborn:
    def rm(self, path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_one_failure_of_the_disk_is_logged_and_training_goes_on(tmp_path, disk, caplog):
    disk.full_at("model_0000001", "model_0000003")
    Run(tmp_path).train(6)
    assert numbers(tmp_path) == [0, 2, 4, 5]
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    assert "model_0000003.pth cannot be written: [Errno 28]" in errors[1]
    assert "The last checkpoint is" in errors[1] and "model_0000002.pth" in errors[1]


def test_a_second_failure_in_a_row_ends_the_training(tmp_path, disk):
    disk.full_at("model_0000002", "model_0000003")
    run = Run(tmp_path)
    with pytest.raises(CheckpointWriteError, match="model_0000003.pth cannot .*The last checkpoint is .*0000001.pth"):
        run.train(6)
    assert run.trainer.iter == 3
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    disk.full_at()
    Run(tmp_path).train(6)
    assert numbers(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_all_ranks_tolerate_the_same_failure_and_end_by_the_same(tmp_path, disk, run_ranks):
    disk.full_at("model_0000001", "model_0000003", "model_0000004")

    def rank_train(rank):
        run = Run(tmp_path, max_to_keep=2)
        with pytest.raises(CheckpointWriteError, match="model_0000004.pth cannot be written: .*Errno 28") as error:
            run.train(9)
        return run.trainer.iter, str(error.value)

    first, second = run_ranks(rank_train, 2)
    assert first == second and first[0] == 4
    assert numbers(tmp_path) == [0, 2]


def test_a_failure_at_the_end_is_an_error(tmp_path, disk):
    disk.full_at("model_final")
    with pytest.raises(CheckpointWriteError, match="model_final.pth cannot be written"):
        Run(tmp_path).train(2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_weights_that_are_not_finite_end_the_training_at_once(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run = Run(tmp_path)
    run.trainer.optimizer.param_groups[0]["lr"] = float("inf")
    run.trainer.optimizer.load_state_dict = lambda state: None
    with pytest.raises(UserError, match="model_0000002.pth is not written: model.linear.weight.* infinite"):
        run.train(9)
    assert numbers(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    "options, message", [({"period": 0}, "^period is 0"), ({"max_to_keep": -1}, "^max_to_keep is -1")]
)
def test_impossible_numbers_are_named(tmp_path, options, message):
    with pytest.raises(ArgumentError, match=message):
        Run(tmp_path, **options)
