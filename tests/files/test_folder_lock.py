"""Two runs in one output folder: the second is refused, and the kernel releases the lock of a killed one."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from mgd_det.errors import UserError
from mgd_det.files import folder_lock
from mgd_det.files.folder_lock import LOCK_FILE, lock_folder, refuse_locked_folder


def hold(folder, pipe):
    lock_folder(folder, "OUTPUT_DIR")
    child = os.fork()  # as a worker of the data loader
    if child > 0:
        pipe.send(child)
    time.sleep(60)
    os._exit(0)


@pytest.fixture
def other(tmp_path):
    """Another process, with a child, that has locked the folder "out"."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hold, args=(str(tmp_path / "out"), theirs))
    process.start()
    child = ours.recv()
    yield process
    process.kill()
    process.join()
    os.kill(child, signal.SIGKILL)


def test_the_message_names_key_folder_and_process(tmp_path, other):
    with pytest.raises(UserError, match=rf"^train.output_dir {tmp_path}/out .* process {other.pid} on "):
        lock_folder(str(tmp_path / "out"), "train.output_dir")
    with pytest.raises(UserError, match=f"process {other.pid}"):  # the first attempt has not erased it
        lock_folder(f"{tmp_path}/./out/", "train.output_dir")
    lock_folder(str(tmp_path / "another"), "train.output_dir")


def test_a_killed_run_leaves_no_lock_even_if_its_workers_live_on(tmp_path, other):
    other.kill()
    other.join()
    lock_folder(str(tmp_path / "out"), "OUTPUT_DIR")
    assert (tmp_path / "out" / LOCK_FILE).read_text().startswith(f"{os.getpid()} on ")


def test_a_process_may_lock_its_folder_again(tmp_path):
    for _ in range(2):
        lock_folder(str(tmp_path / "new" / "deep"), "OUTPUT_DIR")
    assert os.listdir(tmp_path / "new" / "deep") == [LOCK_FILE]


def test_remote_folders_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lock_folder("s3://bucket/out", "OUTPUT_DIR")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"OUTPUT_DIR {tmp_path}/file/out "):
        lock_folder(str(tmp_path / "file" / "out"), "OUTPUT_DIR")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", no_locks)
    lock_folder(str(tmp_path), "OUTPUT_DIR")
    assert "No locks available" in caplog.text and str(tmp_path) in caplog.text


def test_a_look_at_the_lock_refuses_a_locked_folder_and_locks_none(tmp_path, other):
    with pytest.raises(UserError, match=rf"^--output-dir {tmp_path}/out .* process {other.pid} on "):
        refuse_locked_folder(str(tmp_path / "out"), "--output-dir")
    other.kill()
    other.join()
    refuse_locked_folder(str(tmp_path / "out"), "--output-dir")
    refuse_locked_folder(str(tmp_path / "new"), "--output-dir")
    assert not (tmp_path / "new").exists() and (tmp_path / "out" / LOCK_FILE).read_text().startswith(f"{other.pid} on ")
    lock_folder(str(tmp_path / "out"), "OUTPUT_DIR")
    refuse_locked_folder(str(tmp_path / "out"), "--output-dir")  # one's own
