"""Which processes a command line stands for, and what becomes of them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mgd_det.cli.yaml_setup import argument_parser
from mgd_det.distributed.processes import launch
from mgd_det.distributed.supervision import supervise
from mgd_det.distributed.torchrun import fresh_store, is_under_torchrun, resume_after_restart
from mgd_det.engine.hooks.interruption import EXIT_INTERRUPTED
from mgd_det.errors import UserError

TORCHRUN = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "a", "MASTER_PORT": 1}
MODULE = sys.modules[launch.__module__]  # its name in the package is the function's


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in (*TORCHRUN, "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch):
    """What would be started: the job, its environment and its arguments."""
    calls = []

    def start(function, args, nprocs, join):
        calls.append({"job": args[2], "nprocs": nprocs, "environment": dict(os.environ)})
        return type("Context", (), {"processes": []})

    monkeypatch.setattr(MODULE.mp, "start_processes", start)
    return calls


def gpus(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)


def run(*argv, device="cuda"):
    """The arguments with which this process itself ran the program, in a list."""
    ran = []
    launch(ran.append, argument_parser().parse_args([str(x) for x in argv]), device=lambda: device)
    return ran


# ---------------------------------------------------------------------- flags
@pytest.mark.parametrize("there, argv", [(0, []), (1, []), (8, []), (0, ["--num-gpus", 8]), (8, ["--num-gpus", 0])])
def test_one_process_is_this_one(monkeypatch, started, caplog, there, argv):
    gpus(monkeypatch, there)
    assert len(run(*argv, device="not asked")) == 1 and not started
    assert ("one process on the CPU" in caplog.text) == (argv == ["--num-gpus", 8])


@pytest.mark.parametrize(
    "there, argv, device, processes, world_size",
    [
        (8, ["--num-gpus", 8], "cuda", 8, 8),
        (8, ["--num-gpus", 2], "cuda", 2, 2),
        (1, ["--num-machines", 2, "--dist-url", "tcp://127.0.0.1:0"], "cuda", 1, 2),
        (2, ["--cpu-processes", 3], "cpu", 3, 3),
        (0, ["--cpu-processes", 1], "cpu", 1, 1),
        (0, ["--cpu-processes", 2, "--num-machines", 2, "--dist-url", "tcp://127.0.0.1:0"], "cpu", 2, 4),
    ],
)
def test_several_processes(monkeypatch, started, there, argv, device, processes, world_size):
    gpus(monkeypatch, there)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    before = dict(os.environ)
    assert run(*argv) == []
    (call,) = started
    job = call["job"]
    assert (job.device, call["nprocs"], job.world_size) == (device, processes, world_size)
    assert job.url.startswith("tcp://127.0.0.1:") and int(job.url.rpartition(":")[2]) > 0
    assert job.timeout.total_seconds() == 30 * 60
    if device == "cpu":
        assert call["environment"]["CUDA_VISIBLE_DEVICES"] == ""
        assert call["environment"]["OMP_NUM_THREADS"] == str(7 // processes)
    assert dict(os.environ) == before


def test_an_address_of_ipv6_keeps_its_brackets(monkeypatch, started):
    opened = []
    store = type("Store", (), {"port": 29500})
    monkeypatch.setattr(MODULE.dist, "TCPStore", lambda host, *_, **options: opened.append(host) or store)
    run("--cpu-processes", 2, "--dist-url", "tcp://[::1]:29500")
    assert opened == ["::1"] and started[0]["job"].url == "tcp://[::1]:29500"


def test_trainings_on_one_machine_have_ports_of_their_own(monkeypatch, started):
    gpus(monkeypatch, 2)
    taken = []

    def start(function, args, nprocs, join):
        taken.append(args[2].url)
        if len(taken) < 2:
            run("--num-gpus", 2)  # while the first still runs
        return type("Context", (), {"processes": []})

    monkeypatch.setattr(MODULE.mp, "start_processes", start)
    run("--num-gpus", 2)
    assert len(set(taken)) == 2


@pytest.mark.parametrize(
    "there, argv, device, message",
    [
        (2, ["--num-gpus", 8], "cuda", "--num-gpus is 8, but this machine has 2"),
        (2, ["--num-gpus", 2], "cpu", "device is 'cpu', but --num-gpus 2 .*--cpu-processes"),
        (2, ["--num-gpus", 2], "cuda:1", "device is 'cuda:1'"),
        (2, ["--num-gpus", 2, "--cpu-processes", 2], "cuda", "--cpu-processes is 2 with --num-gpus 2"),
        (0, ["--cpu-processes", 0], "cuda", "--cpu-processes is 0"),
        (2, ["--num-machines", 2], "cuda", "--num-machines: give --dist-url tcp://HOST:PORT"),
        (2, ["--num-machines", 2, "--machine-rank", 2], "cuda", "--machine-rank is 2 of --num-machines 2"),
        (0, ["--num-machines", 2, "--dist-url", "tcp://a:1"], "cuda", "no GPU.*--cpu-processes"),
        (0, ["--dist-timeout", "0"], "cuda", "--dist-timeout is 0: give minutes > 0"),
        (0, ["--cpu-processes", 2, "--dist-url", "tcp://127.0.0.1:99999"], "cuda", "99999: cannot be opened.*range"),
    ],
)
def test_flags_that_contradict_the_machine(monkeypatch, started, there, argv, device, message):
    gpus(monkeypatch, there)
    with pytest.raises(UserError, match=message):
        run(*argv, device=device)
    assert not started


# ---------------------------------------------------------------------- torchrun
def set_torchrun(monkeypatch, **changes):
    for name, value in {**TORCHRUN, **changes}.items():
        monkeypatch.setenv(name, str(value))


def test_torchrun_is_recognised_by_its_environment(monkeypatch):
    assert not is_under_torchrun()
    monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set this one for every program
    assert not is_under_torchrun()
    set_torchrun(monkeypatch)
    assert is_under_torchrun()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(UserError, match="lacks LOCAL_WORLD_SIZE: set it"):
        is_under_torchrun()


@pytest.fixture
def join(monkeypatch):
    """What the process would be in the job of torchrun."""
    joined = []
    monkeypatch.setattr(MODULE, "_run_rank", lambda main: main())
    monkeypatch.setattr(MODULE.torchrun, "_shared_store", lambda rank, timeout: None)
    monkeypatch.setattr(MODULE.torchrun, "fresh_store", lambda store, *args: None)
    monkeypatch.setattr(MODULE.ranks, "connect", lambda store: None)
    monkeypatch.setattr(MODULE.ranks, "join", lambda store, **options: joined.append(options))
    return joined


@pytest.mark.parametrize("there, device, used", [(4, "cuda", "cuda"), (4, "cpu", "cpu"), (0, "cuda", "cpu")])
def test_a_rank_of_torchrun(monkeypatch, join, there, device, used):
    gpus(monkeypatch, there)
    set_torchrun(monkeypatch, GROUP_RANK=1)
    for argv in ([], ["--num-gpus", 4, "--num-machines", 2, "--machine-rank", 1], ["--dist-timeout", "7"]):
        assert len(run(*argv, device=device)) == 1
        minutes = 7 if "--dist-timeout" in argv else 30
        expected = {"rank": 5, "world_size": 8, "local_rank": 1, "local_size": 4, "device": used}
        options = join.pop()
        assert options.pop("timeout").total_seconds() == minutes * 60
        assert options == expected


@pytest.mark.parametrize(
    "there, argv, device, message",
    [
        (4, ["--num-gpus", 8], "cuda", "--num-gpus is 8, but torchrun has started 4 .* 8 in all: leave --num-gpus out"),
        (4, ["--num-machines", 4], "cuda", "--num-machines is 4"),
        (4, ["--machine-rank", 1], "cuda", "--machine-rank is 1"),
        (4, ["--dist-url", "tcp://a:1"], "cuda", "--dist-url is tcp://a:1"),
        (4, ["--cpu-processes", 2], "cuda", "--cpu-processes is 2"),
        (2, [], "cuda", "started 4 processes .* sees 2 GPU.*--nproc-per-node 2.*CUDA_VISIBLE_DEVICES"),
        (1, [], "cuda", "--gpus-per-node instead of --gpus-per-task"),
        (4, [], "cuda:0", "device is 'cuda:0', for 8 processes"),
    ],
)
def test_flags_that_contradict_torchrun(monkeypatch, join, there, argv, device, message):
    gpus(monkeypatch, there)
    set_torchrun(monkeypatch)
    with pytest.raises(UserError, match=message):
        run(*argv, device=device)
    assert not join


def torchrun_starts(monkeypatch, folder, restarts, *argv):
    """The remark, and whether the training resumes."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    args = argument_parser().parse_args(argv)
    return resume_after_restart(args, str(folder)), args.resume


def test_a_restart_resumes(monkeypatch, tmp_path):
    out = tmp_path / "out"
    assert torchrun_starts(monkeypatch, out, 2) == ("", False)  # not under torchrun
    assert not out.exists()
    set_torchrun(monkeypatch)
    for flag in ("--eval-only", "--eval-teacher"):
        assert torchrun_starts(monkeypatch, out, 2, flag) == ("", False)
    assert torchrun_starts(monkeypatch, out, 0) == ("", False)
    remark, resume = torchrun_starts(monkeypatch, out, 1)
    assert "Restart 1 by torchrun: the training begins anew" in remark and not resume
    (out / "last_checkpoint").write_text("model_0000009.pth")
    remark, resume = torchrun_starts(monkeypatch, out, 2)
    assert "Restart 2 by torchrun, taken as --resume" in remark and resume
    assert torchrun_starts(monkeypatch, out, 0) == ("", False)  # another torchrun


@pytest.mark.parametrize("first_start_came_here", [True, False])
def test_a_restart_does_not_resume_an_earlier_training(monkeypatch, tmp_path, first_start_came_here):
    set_torchrun(monkeypatch, TORCHELASTIC_RUN_ID="earlier")
    torchrun_starts(monkeypatch, tmp_path, 0)
    last = tmp_path / "last_checkpoint"
    last.write_text("model_final.pth")
    os.utime(last, (1, 1))
    set_torchrun(monkeypatch, TORCHELASTIC_RUN_ID="this")
    if first_start_came_here:
        torchrun_starts(monkeypatch, tmp_path, 0)
    for restart in (1, 2):
        remark, resume = torchrun_starts(monkeypatch, tmp_path, restart)
        assert "begins anew" in remark and not resume
    last.write_text("model_final.pth")  # of the same name, but saved since
    assert torchrun_starts(monkeypatch, tmp_path, 3)[1]


def test_a_damaged_note_of_the_start(monkeypatch, tmp_path):
    set_torchrun(monkeypatch)
    for content in ("", "[]", "{}"):
        (tmp_path / "torchrun_start.json").write_text(content)
        with pytest.raises(UserError, match="torchrun_start.json cannot be read: delete it"):
            torchrun_starts(monkeypatch, tmp_path, 1)


def ranks_meet(store, world_size):
    """The stores that the ranks get, each in a thread of its own."""

    def meet(rank):
        return fresh_store(store, rank, world_size, timedelta(seconds=10))

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(meet, range(world_size)))


def test_ranks_find_nothing_of_those_before_a_restart():
    shared, former = dist.HashStore(), []
    for world_size in (3, 3, 2, 1, 3):  # also where a machine has gone, or come back
        stores = ranks_meet(shared, world_size)
        assert not any(store.check([f"left by {i}"]) for store in stores for i in range(len(former)))
        stores[-1].set(f"left by {len(former)}", "an address")
        assert all(store.get(f"left by {len(former)}") == b"an address" for store in stores)
        former.append(stores)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come(rank):
    with pytest.raises(UserError, match=f"rank {rank}: not all 2 ranks were there within .*--dist-timeout"):
        fresh_store(dist.HashStore(), rank, 2, timedelta(seconds=0.2))


# ---------------------------------------------------------------------- how they end
def start(*functions):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    return processes


def succeed():
    time.sleep(0.1)


def fail():
    sys.exit(3)


def hang():
    time.sleep(600)


def hang_in_spite_of_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_all_succeed():
    assert supervise(start(succeed, succeed, succeed)) == 0


@pytest.mark.parametrize("other, ended_by", [(hang, signal.SIGTERM), (hang_in_spite_of_sigterm, signal.SIGKILL)])
def test_one_fails_and_the_others_do_not_hang(other, ended_by):
    processes = start(other, succeed, fail)
    begin = time.monotonic()
    assert supervise(processes, grace=0.5) == 3
    assert time.monotonic() - begin < 5
    assert [p.exitcode for p in processes] == [-ended_by, 0, 3]


def test_one_that_is_killed_is_named(caplog):
    assert supervise(start(succeed, be_killed), grace=0.5) == 128 + signal.SIGKILL
    assert "process 1 of this machine was ended by SIGKILL: was the machine out of memory?" in caplog.text


def save_at_sigterm():
    def save(*_):
        time.sleep(1)  # longer than the grace
        sys.exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGTERM, save)
    time.sleep(600)


def leave_at_sigterm():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))
    time.sleep(600)


def test_a_signal_is_passed_on_and_saving_may_take_its_time(caplog):
    before = signal.getsignal(signal.SIGTERM)
    processes = start(save_at_sigterm, leave_at_sigterm)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert supervise(processes, grace=0.1) == EXIT_INTERRUPTED
    assert [p.exitcode for p in processes] == [EXIT_INTERRUPTED] * 2
    assert signal.getsignal(signal.SIGTERM) is before and not caplog.text


def fail_at_sigterm():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    time.sleep(600)


def test_one_that_fails_while_saving_after_a_signal_does_not_leave_the_others_waiting():
    processes = start(fail_at_sigterm, hang_in_spite_of_sigterm)
    begin = time.monotonic()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert supervise(processes, grace=0.3) == 3
    assert time.monotonic() - begin < 5
    assert [p.exitcode for p in processes] == [3, -signal.SIGKILL]


# ---------------------------------------------------------------------- real ranks
PROGRAM = """
import os, sys, time
import torch, torch.distributed as dist
from detectron2.utils import comm
from mgd_det.cli.error_reports import run_program
from mgd_det.cli.yaml_setup import argument_parser
from mgd_det.distributed.processes import launch

def main(args):
    total = torch.ones(1) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    seen = f"SEEN {dist.get_backend()} {dist.get_world_size()} {comm.get_local_rank()} {int(total)}"
    os.write(1, f"{seen}\\n".encode())  # at once: print may write in pieces, which mix with those of the other rank
    assert not torch.cuda.is_available() and torch.get_num_threads() == 1
    if dist.get_rank() == 1:
        raise RuntimeError("a bug of rank 1")
    dist.all_reduce(total)

if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    run_program(lambda: launch(main, arguments, device=lambda: "cuda"))
"""


def test_an_error_of_one_rank_ends_all_and_is_shown_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, str(program), "--cpu-processes", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        timeout=240,
        check=False,
    )
    seen = sorted(line for line in result.stdout.splitlines() if line.startswith("SEEN"))
    assert seen == ["SEEN gloo 2 0 3", "SEEN gloo 2 1 3"], result.stderr
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1 and "RuntimeError: a bug of rank 1" in result.stderr, result.stderr
