"""A folder of checkpoints after a kill, a full disk and values that are not finite."""

import errno
import multiprocessing
import os
import resource
import signal
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from checkpoint.trainings import Training, assert_resumes, names
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from mgd_det.checkpoint import CheckpointWriteError, TrainingCheckpointer, training_checkpointer
from mgd_det.checkpoint.finite import non_finite_tensors
from mgd_det.checkpoint.training_checkpointer import complete_over_ranks
from mgd_det.errors import UserError
from mgd_det.files import atomic_files


class FailingFile:
    """A file that calls ``fail`` when its byte ``limit`` is to be written, after what comes before it."""

    def __init__(self, file, limit, fail):
        self._file, self._limit, self._fail = file, limit, fail

    def write(self, data):
        room = self._limit - self._file.tell()
        if room < len(data):
            self._file.write(bytes(data)[: max(room, 0)])
            self._file.flush()
            self._fail()
        return self._file.write(data)

    def flush(self):
        self._file.flush()


def fail_at(monkeypatch, limit, fail):
    original = torch.save
    monkeypatch.setattr(torch, "save", lambda state, f: original(state, FailingFile(f, limit, fail)))


# ------------------------------------------------------------------ a write that fails or is killed
def test_saves_what_plain_torch_reads_and_leaves_nothing_beside(tmp_path):
    training = Training(tmp_path)
    training.save(1, 3)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth", "model_0000003.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    content = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert list(content) == ["model", "optimizer", "iteration"]
    assert torch.equal(content["model"]["0.weight"], training.model[0].weight)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "model_0000003.pth").stat().st_mode & 0o777 == 0o666 & ~umask


MOMENTS = [*(("write", share) for share in (0, 0.01, 0.5, 0.999)), ("rename", 1), ("rename", 2)]


@pytest.mark.parametrize("what, when", MOMENTS)
@pytest.mark.parametrize("name", ["model_0000005", "model_0000003"])  # a new one, and the last one again
def test_killed_at_any_moment_the_last_checkpoint_is_whole(tmp_path, monkeypatch, what, when, name):
    training = Training(tmp_path)
    expected = training.save(1, 3)
    size = (tmp_path / "model_0000003.pth").stat().st_size

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    def child():
        torch.set_num_threads(1)
        training.step()
        torch.save(training.tensors(), tmp_path / "stepped")  # a step of another process may round differently
        if what == "write":
            fail_at(monkeypatch, int(when * size), killed)
        else:
            renames, replace = [], os.replace
            monkeypatch.setattr(
                os, "replace", lambda *a: (renames.append(a), len(renames) == when and killed(), replace(*a))
            )
        training.checkpointer.save(name, iteration=int(name[-7:]))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert any(name.endswith(".mgd_partial") for name in names(tmp_path))
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    if (what, when, name) == ("rename", 2, "model_0000003"):  # it was complete, only not yet named
        expected = torch.load(tmp_path / "stepped")
    assert_resumes(tmp_path, "model_0000003.pth", expected)
    assert not any("partial" in name for name in names(tmp_path))


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("limit", [0, 3000])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch, limit):
    training = Training(tmp_path)
    expected = training.save(1)
    training.step()
    with monkeypatch.context() as patch:
        fail_at(patch, limit, full)
        with pytest.raises(CheckpointWriteError) as raised:
            training.checkpointer.save("model_0000003", iteration=3)
    message = str(raised.value)
    assert f"checkpoint {tmp_path}/model_0000003.pth cannot be written: [Errno 28] No space left" in message
    assert "MiB of free space" in message and f"The last checkpoint is {tmp_path}/model_0000001.pth" in message
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    assert_resumes(tmp_path, "model_0000001.pth", expected)
    training.save(5)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth", "model_0000005.pth"]


@contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_cuts_short(tmp_path):
    """The operating system's own error in the middle of the file, which torch's writer turns into a RuntimeError."""
    training = Training(tmp_path)
    expected = training.save(1)
    with file_size_limit(8000), pytest.raises(CheckpointWriteError, match=r"\[Errno 27\] File too large"):
        training.save(3)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    assert_resumes(tmp_path, "model_0000001.pth", expected)


def test_the_name_is_given_once_the_content_is_on_the_disk(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(atomic_files.os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")))
    replace = os.replace
    monkeypatch.setattr(atomic_files.os, "replace", lambda a, b: (done.append(b), replace(a, b)))
    Training(tmp_path).save(1)
    path, last = str(tmp_path / "model_0000001.pth"), str(tmp_path / "last_checkpoint")
    partial = f".{os.getpid()}.mgd_partial"
    assert done == [path + partial, path, str(tmp_path), last + partial, last, str(tmp_path)]


def test_only_partial_files_are_removed(tmp_path):
    ours = ["model_0000001.pth.77.mgd_partial", "last_checkpoint.8.mgd_partial"]
    others = ["mgd_partial", "model_0000001.pth.mgd_partial", "notes.part", "x.pth", "x.pth.77.mgd_partial.txt"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("x")
    assert atomic_files.remove_partial_files(str(tmp_path)) == sorted(ours)
    assert names(tmp_path) == sorted(others)
    assert atomic_files.remove_partial_files(str(tmp_path / "nowhere")) == []


# ------------------------------------------------------------------ several ranks
class Summed:
    """Its state is the sum of all ranks' numbers."""

    def __init__(self, name, number):
        self.name, self.number, self.completes = name, torch.tensor([number]), None

    def state_dict(self):
        state = {"sum": self.number.clone()}
        self.completes = complete_over_ranks(self.name, lambda: dist.all_reduce(state["sum"]))
        return state


def test_every_rank_collects_its_state_in_any_order_and_rank_0_writes(tmp_path, run_ranks):
    def rank_save(rank):
        parts = {"a": Summed("a", 1 + rank), "b": Summed("b", 10 + 10 * rank)}
        if rank == 1:
            parts = dict(reversed(parts.items()))
        checkpointer = TrainingCheckpointer(Training(tmp_path, seed=rank).model, str(tmp_path), **parts)
        checkpointer.save("model_final", iteration=3)
        return torch.load(tmp_path / "model_final.pth")  # it is there on every rank when save() returns

    first, second = run_ranks(rank_save, 2)
    assert first["a"] == second["a"] == {"sum": 3} and first["b"] == {"sum": 30} and first["iteration"] == 3
    assert torch.equal(first["model"]["0.weight"], Training(tmp_path, seed=0).model[0].weight)


def test_outside_of_a_collective_save_a_state_is_of_one_rank():
    subject = Summed("a", 5)
    assert subject.state_dict() == {"sum": 5} and subject.completes is False


def test_a_failed_write_is_an_error_on_every_rank(tmp_path, run_ranks, monkeypatch):
    def rank_save(rank):
        training = Training(tmp_path)
        training.save(1)
        with monkeypatch.context() as patch:
            fail_at(patch, 0, full)
            with pytest.raises(CheckpointWriteError) as failed:
                training.save(3)
        if rank == 0:  # whose weights are those that would be saved
            training.model[0].weight.data[0] = float("nan")
        with pytest.raises(UserError, match="model_0000005.pth is not written: model.0.weight") as spoilt:
            training.save(5)
        return str(failed.value), str(spoilt.value)

    first, second = run_ranks(rank_save, 2)
    assert first == second and "model_0000003.pth cannot be written: [Errno 28]" in first[0]
    assert names(tmp_path)[:2] == ["last_checkpoint", "model_0000001.pth"] and "model_0000003.pth" not in names(
        tmp_path
    )


@pytest.mark.slow
def test_a_save_on_one_rank_alone_is_an_error_that_says_so(tmp_path, run_ranks, monkeypatch):
    """The other rank waits in another collective, which must not pair with the save."""
    monkeypatch.setattr(training_checkpointer, "RANKS_TIMEOUT", timedelta(seconds=2))

    def rank_save(rank):
        if rank == 0:
            with pytest.raises(UserError, match="model_best.pth is not written: .* collective.* 2 s .*on every rank"):
                Training(tmp_path).checkpointer.save("model_best")
        else:
            with pytest.raises(RuntimeError):
                dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()  # which the timeout has closed
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2)

    run_ranks(rank_save, 2)
    assert not (tmp_path / "model_best.pth").exists()


# ------------------------------------------------------------------ values that are not finite
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "spoil, name",
    [
        (lambda t: t.model[0].weight.data[3], "model.0.weight"),
        (lambda t: t.model[1].running_var, "model.1.running_var"),
        (lambda t: t.optimizer.state[t.model[0].bias]["momentum_buffer"], "optimizer.state.1.momentum_buffer"),
    ],
)
def test_nothing_that_is_not_finite_is_saved(tmp_path, spoil, name, value):
    training = Training(tmp_path)
    expected = training.save(1)
    training.step()
    spoil(training)[2] = value
    with pytest.raises(UserError, match=rf"model_0000001.pth is not written: {name} .*The last checkpoint is"):
        training.checkpointer.save("model_0000001", iteration=1)
    assert_resumes(tmp_path, "model_0000001.pth", expected)


def test_numbers_may_be_infinite(tmp_path):
    training = Training(tmp_path)
    training.checkpointer.save("model_final", scaler={"scale": float("inf")}, best=[float("-inf")], iteration=3)
    assert torch.load(tmp_path / "model_final.pth")["scaler"] == {"scale": float("inf")}


def test_names_of_tensors_of_all_kinds():
    nan = float("nan")
    state = {
        "whole": torch.arange(3),
        "half": torch.tensor([1.0, nan]).half(),
        "nested": [{"a": torch.zeros(0)}, (torch.tensor(nan, dtype=torch.float64), torch.ones(2))],
        "complex": torch.tensor([complex(0, float("inf"))]),
        "bfloat16": torch.full((3,), 3e38, dtype=torch.bfloat16),
    }
    assert non_finite_tensors(state) == ["half", "nested.1.0", "complex"]
    assert non_finite_tensors({}) == []


def test_a_remote_folder_is_left_to_the_path_manager(tmp_path):
    class Bucket(PathHandler):
        def _get_supported_prefixes(self):
            return ["bucket://"]

        def _get_local_path(self, path, force=False, **kwargs):
            return str(tmp_path / path[len("bucket://run/") :])

        def _open(self, path, mode="r", **kwargs):
            return open(self._get_local_path(path), mode)

        def _exists(self, path, **kwargs):
            return os.path.exists(self._get_local_path(path))

    bucket = Bucket()
    PathManager.register_handler(bucket)
    try:
        expected = Training("bucket://run").save(1, 3)
        assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth", "model_0000003.pth"]
        training = Training("bucket://run", seed=9)
        assert training.checkpointer.resume_or_load("")["iteration"] == 3
        assert training.checkpointer.resumed_from == "bucket://run/model_0000003.pth"
        assert all(torch.equal(a, b) for a, b in zip(training.tensors(), expected))
        training.model[0].weight.data[0] = float("nan")
        with pytest.raises(UserError, match="bucket://run/model_0000005.pth is not written: model.0.weight"):
            training.checkpointer.save("model_0000005")
    finally:
        del PathManager._path_handlers["bucket://"]
