"""What a kill, a full disk and values that are not finite leave of a folder of checkpoints."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import zipfile
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from mgd_det.checkpoint import CheckpointWriteError, TrainingCheckpointer, atomic_file
from mgd_det.checkpoint.finite import non_finite_tensors
from mgd_det.errors import UserError


class Training:
    """A small model and optimizer, and their checkpointer."""

    def __init__(self, folder, seed=0, features=50):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(features, 40), nn.BatchNorm1d(40))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.checkpointer = TrainingCheckpointer(self.model, str(folder), optimizer=self.optimizer)

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self.model[0].in_features)).square().mean().backward()
        self.optimizer.step()

    def save(self, *iterations):
        """Steps and saves; returns the weights as saved in the last."""
        for iteration in iterations:
            self.step()
            self.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        return [value.clone() for value in self.tensors()]

    def tensors(self):
        momenta = [state["momentum_buffer"] for state in self.optimizer.state_dict()["state"].values()]
        return [*self.model.state_dict().values(), *momenta]


def assert_resumes(folder, name, tensors):
    """A new training in the folder goes on from this checkpoint, with these weights and momenta."""
    training = Training(folder, seed=9)
    rest = training.checkpointer.resume_or_load("", resume=True)
    assert training.checkpointer.resumed_from == str(folder / name)
    assert rest["iteration"] == int(re.findall(r"\d+", name)[0])
    actual = training.tensors()
    assert len(actual) == len(tensors) and all(torch.equal(a, b) for a, b in zip(actual, tensors))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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
@pytest.mark.parametrize("name", ["model_0000005", "model_0000003"])  # a new one, and the last one anew
def test_killed_at_any_moment_the_last_checkpoint_is_whole(tmp_path, monkeypatch, what, when, name):
    training = Training(tmp_path)
    expected = training.save(1, 3)
    size = (tmp_path / "model_0000003.pth").stat().st_size

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    def child():
        torch.set_num_threads(1)
        training.step()
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
    if (what, when, name) == ("rename", 2, "model_0000003"):  # it was there, only to be named
        training.step()
        expected = training.tensors()
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
    """The operating system's own refusal in the midst of the file: torch's writer makes a RuntimeError of it."""
    training = Training(tmp_path)
    expected = training.save(1)
    with file_size_limit(8000), pytest.raises(CheckpointWriteError, match=r"\[Errno 27\] File too large"):
        training.save(3)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    assert_resumes(tmp_path, "model_0000001.pth", expected)


def test_the_name_is_given_once_the_content_is_on_the_disk(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(atomic_file.os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")))
    replace = os.replace
    monkeypatch.setattr(atomic_file.os, "replace", lambda a, b: (done.append(b), replace(a, b)))
    Training(tmp_path).save(1)
    path, last = str(tmp_path / "model_0000001.pth"), str(tmp_path / "last_checkpoint")
    partial = f".{os.getpid()}.mgd_partial"
    assert done == [path + partial, path, str(tmp_path), last + partial, last, str(tmp_path)]


def test_only_partial_files_are_removed(tmp_path):
    ours = ["model_0000001.pth.77.mgd_partial", "last_checkpoint.8.mgd_partial"]
    others = ["mgd_partial", "model_0000001.pth.mgd_partial", "notes.part", "x.pth", "x.pth.77.mgd_partial.txt"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("x")
    assert atomic_file.remove_partial_files(str(tmp_path)) == sorted(ours)
    assert names(tmp_path) == sorted(others)
    assert atomic_file.remove_partial_files(str(tmp_path / "nowhere")) == []


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
    with pytest.raises(UserError, match=rf"model_0000001.pth is not written, for {name} has .*The last checkpoint is"):
        training.checkpointer.save("model_0000001", iteration=1)
    assert_resumes(tmp_path, "model_0000001.pth", expected)


def test_numbers_that_may_be_infinite_are_no_hindrance(tmp_path):
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


# ------------------------------------------------------------------ damaged checkpoints
def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def forge_the_pickle(path):
    """A zip file whose checksums are right and whose content is none."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, b"\x80nonsense" if name.endswith("data.pkl") else content)


def of_weights_alone(path):
    torch.save({"model": torch.load(path)["model"]}, path)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut, "cannot be read: it is empty, cut short"),
        (lambda path: path.write_bytes(b""), "cannot be read: it is empty"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cannot be read: it is empty"),
        (flip_a_bit, "the checksum of its part .* is wrong"),
        (forge_the_pickle, "cannot be read: .*Error: "),
        (of_weights_alone, "it was not saved by a training: it has no entry optimizer"),
        (lambda path: torch.save([1], path), "it was not saved by a training: it has no entry model, optimizer"),
    ],
)
def test_falls_back_on_the_newest_older_one_that_reads(tmp_path, caplog, damage, reason):
    training = Training(tmp_path)
    training.save(1)
    expected = training.save(3)
    training.save(5, 7)
    for name in ("model_0000005.pth", "model_0000007.pth"):
        damage(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if name.endswith(".pth")}
    assert_resumes(tmp_path, "model_0000003.pth", expected)
    (warning,) = [record.message for record in caplog.records if "Falling back" in record.message]
    assert re.search(f"model_0000007.pth: .*{reason}.*; model_0000005.pth: .*{reason}.*model_0000003.pth", warning)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    # The next resume, and whoever else reads it, starts from there too.
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    caplog.clear()
    assert_resumes(tmp_path, "model_0000003.pth", expected)
    assert not any("Falling back" in record.message for record in caplog.records)


@pytest.mark.parametrize("last", [None, b"", b"\n", bytes(17), b"model_0000099.pth"])
def test_a_last_checkpoint_that_names_none(tmp_path, last):
    expected = Training(tmp_path).save(1, 3)
    if last is None:
        (tmp_path / "last_checkpoint").unlink()
    else:
        (tmp_path / "last_checkpoint").write_bytes(last)
    assert_resumes(tmp_path, "model_0000003.pth", expected)


def test_the_final_checkpoint_counts_by_its_iteration(tmp_path):
    training = Training(tmp_path)
    training.save(3)
    training.step()
    training.checkpointer.save("model_final", iteration=5)
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    checkpointer = Training(tmp_path).checkpointer
    checkpointer.resume_or_load("")
    assert checkpointer.resumed_from == str(tmp_path / "model_final.pth")
    # That of a longer training of before is none to fall back on, nor are its periodic ones.
    training.save(9)
    cut(tmp_path / "model_0000009.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    checkpointer.resume_or_load("")
    assert checkpointer.resumed_from == str(tmp_path / "model_0000003.pth")


def test_where_none_reads_the_error_names_them_all_and_nothing_changes(tmp_path):
    Training(tmp_path).save(1, 3)
    for name in ("model_0000001.pth", "model_0000003.pth"):
        cut(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    message = "--resume: no checkpoint in .*: model_0000003.pth: .*model_0000001.pth: .*or train without --resume"
    with pytest.raises(UserError, match=message.replace(": model", ".*model")):
        Training(tmp_path).checkpointer.resume_or_load("", resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize("name", ["../other/model_0000001.pth", "/tmp/model_0000001.pth", "..", "sub/model_final.pth"])
def test_last_checkpoint_does_not_lead_out_of_the_folder(tmp_path, name):
    Training(tmp_path).save(1)
    (tmp_path / "last_checkpoint").write_text(name)
    with pytest.raises(UserError, match=f"last_checkpoint holds '{name}'"):
        Training(tmp_path).checkpointer.resume_or_load("", resume=True)


def test_a_folder_without_checkpoints_starts_anew(tmp_path):
    torch.save({"model": Training(tmp_path, seed=3).model.state_dict()}, tmp_path / "weights.pth")
    training = Training(tmp_path)
    training.checkpointer.resume_or_load(str(tmp_path / "weights.pth"), resume=True)
    assert training.checkpointer.resumed_from == ""
    assert torch.equal(training.model[0].weight, Training(tmp_path, seed=3).model[0].weight)


def test_a_checkpoint_of_another_network_is_no_fallback(tmp_path):
    Training(tmp_path, features=30).save(1)
    Training(tmp_path).save(3)
    cut(tmp_path / "model_0000003.pth")
    with pytest.raises(UserError, match=r"model_0000001.pth is of another network: .*0\.weight"):
        Training(tmp_path).checkpointer.resume_or_load("", resume=True)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_a_checkpoint_of_another_optimizer_is_named(tmp_path):
    Training(tmp_path).save(1)
    training = Training(tmp_path)
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(UserError, match="model_0000001.pth does not fit this training: ValueError: .*groups"):
        training.checkpointer.resume_or_load("", resume=True)


def test_code_in_a_checkpoint_is_no_damage_to_pass_over(tmp_path):
    Training(tmp_path).save(1, 3)
    content = torch.load(tmp_path / "model_0000003.pth")
    torch.save({**content, "x": multiprocessing.Process}, tmp_path / "model_0000003.pth")
    with pytest.raises(UserError, match="model_0000003.pth: it refers to multiprocessing"):
        Training(tmp_path).checkpointer.resume_or_load("", resume=True)
