"""What a user reads when a program ends otherwise than it should."""

import logging
import os
import signal

import pytest
import torch
from torch import nn
from torch.multiprocessing import reductions
from torch.utils.data import DataLoader

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.cli.error_reports import run_program
from mgd_det.engine.training_errors import death_of_worker, explained_training_errors
from mgd_det.engine.training_step import TrainStep
from mgd_det.errors import UserError


class Data:
    """Numbers, at the first of which the loader's worker does something else: no batch before is on its way then."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 100

    def __getitem__(self, i):
        if i == 0:
            self.act()
        return torch.ones(1)


class Net(nn.Linear):
    def forward(self, batch):
        return {"loss": super().forward(batch).square().mean()}


def train(folder, act, workers=1):
    """A training that has a checkpoint already; the worker of its loader runs ``act`` first."""
    model = Net(1, 1)
    loader = DataLoader(Data(act), num_workers=workers, multiprocessing_context="fork" if workers else None)
    trainer = TrainStep(model, loader, torch.optim.SGD(model.parameters(), 0.1))
    checkpointer = TrainingCheckpointer(model, str(folder), trainer=trainer)
    checkpointer.save("model_0000003")
    with explained_training_errors(checkpointer, "Lower the learning rate."):
        trainer.train(0, 50)


def ended(main, capfd):
    with pytest.raises(SystemExit) as end:
        run_program(main)
    return end.value.code, capfd.readouterr().err


@pytest.mark.parametrize(
    "number, advice",
    [
        (signal.SIGKILL, "Killed. Most often .* memory: lower DATALOADER.NUM_WORKERS"),
        (signal.SIGBUS, "Bus error. Shared memory is full: .*--shm-size"),
        (signal.SIGUSR1, "User defined signal 1. It may .* lower DATALOADER.NUM_WORKERS"),
    ],
)
def test_a_worker_of_the_data_loader_that_dies(tmp_path, caplog, number, advice):
    def dies():
        os.kill(os.getpid(), number)

    said = f"^DataLoader worker .pid.* is killed by signal: {advice}"
    with pytest.raises(UserError, match=f"{said}.*The last checkpoint is .*model_0000003.pth.$"):
        train(tmp_path, dies)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_worker_that_dies_while_it_hands_over_a_batch(capfd):
    class OfDeadWorker:
        def detach(self):
            raise ConnectionResetError("reset by peer")

    status, err = ended(lambda: reductions.rebuild_storage_fd(torch.UntypedStorage, OfDeadWorker(), 4), capfd)
    assert status == 1 and err.startswith("error: A worker of the data loader ended while it handed over a batch")
    with pytest.raises(ConnectionResetError):
        run_program(OfDeadWorker().detach)


def test_a_worker_that_dies_outside_of_training(capfd):
    def main():
        for _ in DataLoader(Data(lambda: os._exit(3)), num_workers=1, multiprocessing_context="fork"):
            pass

    status, err = ended(main, capfd)
    assert status == 1 and err.startswith("error: DataLoader worker (pid") and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_of_a_worker_is_its_message(tmp_path, capfd, caplog, workers):
    def fails():
        raise UserError("the image a.jpg is gone: put it back")

    status, err = ended(lambda: train(tmp_path, fails, workers), capfd)
    assert (status, err) == (1, "error: the image a.jpg is gone: put it back\n")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_loss_of_nan_names_the_last_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Net, "forward", lambda self, batch: {"loss": self.weight.sum() * torch.nan})
    with pytest.raises(UserError, match="(?s)iteration=0\nloss=nan.*model_0000003.pth. Lower the learning rate.$"):
        train(tmp_path, lambda: None, 0)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_errors_of_the_code_stay_what_they_are(tmp_path, caplog):
    def fails():
        raise RuntimeError("a bug")

    assert death_of_worker(RuntimeError("a bug")) is None
    with pytest.raises(RuntimeError, match="a bug"):
        run_program(lambda: train(tmp_path, fails, 0))
    assert "Exception during training" in caplog.text


def test_ctrl_c_outside_of_training(capfd):
    assert ended(lambda: os.kill(os.getpid(), signal.SIGINT), capfd) == (130, "error: interrupted\n")


def test_the_result_of_a_program_that_ends_well():
    assert run_program(lambda: 5) == 5
