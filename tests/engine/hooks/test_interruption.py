"""SIGTERM and SIGINT during a training, on one rank and on one of two."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import toy
from detectron2.engine import hooks
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.cli.error_reports import run_program
from mgd_det.engine.hooks import interruption
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.interruption import Interruption, TrainingInterrupted
from mgd_det.engine.training_step import TrainStep
from mgd_det.errors import UserError

TERM, INT = signal.SIGTERM, signal.SIGINT
HANDLERS = [signal.getsignal(number) for number in (TERM, INT)]


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    yield
    assert [signal.getsignal(number) for number in (TERM, INT)] == HANDLERS


class Net(nn.Module):
    """The loss of a number; a batch may be a function instead, which is called in the forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        if callable(batch[0]):
            batch[0]()
            batch = [2.0]
        return {"loss": (self.weight * batch[0] - 1).square().sum()}


def sends(*numbers, to=None):
    return [lambda: [os.kill(to or os.getpid(), number) for number in numbers]]


class Saves(TrainingCheckpointer):
    def save(self, name, **kwargs):
        self.names = [*getattr(self, "names", []), name]
        super().save(name, **kwargs)


def made(folder, batches, model=None, period=100):
    """A training with the hooks of rank 0, in their order."""
    folder.mkdir(exist_ok=True)
    model = Net() if model is None else model
    trainer = TrainStep(model, batches, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    trainer.checkpointer = Saves(model, str(folder), trainer=trainer)
    trainer.evaluations = []
    evaluation = hooks.EvalHook(0, lambda: trainer.evaluations.append(trainer.iter))
    interruption_hook = Interruption(trainer.checkpointer, trainer)
    trainer.register_hooks([interruption_hook, CheckpointHook(trainer.checkpointer, period), evaluation])
    return trainer


@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize("period", [1, 100])
def test_the_step_is_finished_and_saved_once_and_resumed(tmp_path, number, period):
    whole = made(tmp_path / "whole", [[2.0]] * 5)
    whole.train(0, 5)
    assert whole.evaluations == [5]
    stopped = made(tmp_path / "out", [[2.0], [2.0], sends(number), [2.0]], period=period)
    with pytest.raises(TrainingInterrupted, match="after iteration 2, saved as .*model_0000002.pth; --resume"):
        stopped.train(0, 5)
    assert stopped.checkpointer.names[-1] == "model_0000002" and stopped.evaluations == []
    assert stopped.checkpointer.names.count("model_0000002") == 1

    resumed = made(tmp_path / "out", [[2.0]] * 2)
    resumed.checkpointer.resume_or_load("", resume=True)
    assert resumed.iter == 2
    resumed.train(3, 5)
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_the_last_step_ends_as_model_final_before_the_evaluation(tmp_path):
    trainer = made(tmp_path, [[2.0], sends(TERM)])
    with pytest.raises(TrainingInterrupted, match="after the last iteration.*model_final.pth"):
        trainer.train(0, 2)
    assert trainer.checkpointer.names == ["model_final"] and trainer.evaluations == []


def test_what_was_logged_is_written_when_the_last_step_is_stopped(tmp_path):
    class Writer(EventWriter):
        calls = []

        def write(self):
            self.calls.append("write")

        def close(self):
            self.calls.append("close")

    trainer = made(tmp_path, [[2.0], sends(TERM)])
    trainer.register_hooks([hooks.PeriodicWriter([Writer()], period=100)])
    with pytest.raises(TrainingInterrupted, match="after the last iteration"):
        trainer.train(0, 2)
    assert Writer.calls[-1] == "close" and "write" in Writer.calls


def test_signals_close_together_are_one_and_a_later_one_ends_at_once(tmp_path, monkeypatch, capfd):
    trainer = made(tmp_path / "a", [sends(INT, TERM, INT), [2.0]])
    with pytest.raises(TrainingInterrupted):
        trainer.train(0, 5)
    assert capfd.readouterr().err.count("SIGINT: stopping after this step") == 1
    monkeypatch.setattr(interruption, "_ONE_SIGNAL", 0)
    trainer = made(tmp_path / "b", [sends(INT, INT), [2.0]])
    with pytest.raises(KeyboardInterrupt):
        trainer.train(0, 5)
    assert not list((tmp_path / "b").iterdir())


def test_an_error_after_the_signal_is_the_error(tmp_path):
    def fails():
        os.kill(os.getpid(), TERM)
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        made(tmp_path, [[fails]]).train(0, 5)


def test_a_save_that_fails_is_the_error(tmp_path, monkeypatch):
    def fails(self, name, **kwargs):
        raise UserError("disk full")

    monkeypatch.setattr(Saves, "save", fails)
    with pytest.raises(UserError, match="disk full"):
        made(tmp_path, [sends(TERM), [2.0]]).train(0, 5)


def test_ignored_signals_stay_ignored(tmp_path):
    """As SIGINT of what a shell starts in the background."""
    signal.signal(INT, signal.SIG_IGN)
    try:
        made(tmp_path, [sends(INT), [2.0], [2.0]]).train(0, 3)
        assert signal.getsignal(INT) == signal.SIG_IGN
    finally:
        signal.signal(INT, HANDLERS[1])


def test_outside_of_the_main_thread_training_goes_on_without_handlers(tmp_path):
    seen = []
    trainer = made(tmp_path, [[lambda: seen.append(signal.getsignal(TERM))], [2.0]])
    thread = threading.Thread(target=trainer.train, args=(0, 2))
    thread.start()
    thread.join(60)
    assert trainer.checkpointer.names == ["model_final"] and seen == HANDLERS[:1]


def test_a_forked_process_does_not_take_the_signal_for_its_own(tmp_path, capfd):
    exit_codes = []

    def forks():
        child = multiprocessing.get_context("fork").Process(target=lambda: (os.kill(os.getpid(), INT), os._exit(7)))
        child.start()
        child.join(60)
        exit_codes.append(child.exitcode)

    made(tmp_path, [[forks], [2.0]]).train(0, 2)
    assert exit_codes == [7] and "SIGINT" not in capfd.readouterr().err


def test_a_signal_to_one_of_two_ranks_stops_both(tmp_path, run_ranks):
    def rank_train(rank):
        batches = [[2.0], sends(TERM) if rank == 1 else [2.0], *[[2.0]] * 8]
        trainer = made(tmp_path / "out", batches, DistributedDataParallel(Net()))
        with pytest.raises(TrainingInterrupted) as error:
            trainer.train(0, 10)
        return trainer.iter, str(error.value), trainer.checkpointer.names

    first, second = run_ranks(rank_train, 2)
    # The request is agreed on with the step's losses.
    assert first == second and first[0] == 1 and first[2] == ["model_0000001"]
    assert torch.load(tmp_path / "out" / "model_0000001.pth")["iteration"] == 1


def test_status_75_and_one_line(tmp_path, capfd):
    trainer = made(tmp_path, [sends(TERM), [2.0]])
    with pytest.raises(SystemExit) as end:
        run_program(lambda: trainer.train(0, 5))
    assert end.value.code == interruption.EXIT_INTERRUPTED == os.EX_TEMPFAIL
    lines = capfd.readouterr().err.splitlines()
    notice, said = [line for line in lines if "stop" in line]
    assert notice.startswith("SIGTERM: ") and f"iteration 0, saved as {tmp_path}/model_0000000.pth; --resume" in said


@pytest.mark.slow
def test_a_preempted_job_with_its_data_loaders_workers(tmp_path):
    """As SLURM does it: every process of the job gets the signal."""
    flags = toy.write_scenes(tmp_path / "toy", train=4, val=1)[:4]
    opts = [*toy.plain_opts(), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 5000, "SOLVER.STEPS", "()"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 1000, "DATALOADER.NUM_WORKERS", 1, "DATASETS.TEST", "()", "SEED", 3]
    program = str(Path(__file__).parents[3] / "tools" / "train_net.py")
    command = [sys.executable, program, "--config-file", toy.RETINANET, *flags, *(str(opt) for opt in opts)]
    command += ["OUTPUT_DIR", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "output.txt", "wb") as file:
        job = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    metrics, deadline = tmp_path / "out" / "metrics.json", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):  # written from iteration 19 on
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.05)
    os.killpg(job.pid, TERM)
    status, said = job.wait(60), (tmp_path / "output.txt").read_text()
    assert status == 75 and "Traceback" not in said and "error:" not in said, said
    (name,) = re.findall(r"saved as .*/(model_\d{7}).pth; --resume", said)
    saved = torch.load(tmp_path / "out" / f"{name}.pth")
    assert f"model_{saved['iteration']:07d}" == name and saved["iteration"] >= 19
    assert (tmp_path / "out" / "last_checkpoint").read_text() == f"{name}.pth"
