"""Which processes a command line stands for, and how they join."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mgd_det.cli.yaml_setup import argument_parser
from mgd_det.distributed import processes, torchrun
from mgd_det.distributed.processes import launch
from mgd_det.distributed.torchrun import fresh_store, is_under_torchrun
from mgd_det.errors import UserError

TORCHRUN = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "a", "MASTER_PORT": 1}


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in (*TORCHRUN, "GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch):
    """What would be started: the options, the arguments of a rank and its environment."""
    calls = []

    def run_ranks(program, args, **options):
        calls.append({**options, "args": args, "environment": dict(os.environ)})
        return 0

    monkeypatch.setattr(processes, "run_ranks", run_ranks)
    return calls


def gpus(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)


def run(*argv, device="cuda"):
    """The arguments with which this process itself ran the program, in a list."""
    ran = []
    launch(ran.append, argument_parser().parse_args([str(x) for x in argv]), lambda args: device, program=print)
    return ran


# ---------------------------------------------------------------------- flags
@pytest.mark.parametrize("there, argv", [(0, []), (1, []), (8, []), (0, ["--num-gpus", 8]), (8, ["--num-gpus", 0])])
def test_one_process_is_this_one(monkeypatch, started, caplog, there, argv):
    gpus(monkeypatch, there)
    assert len(run(*argv, device="not asked")) == 1 and not started
    assert ("one process on the CPU" in caplog.text) == (argv == ["--num-gpus", 8])


@pytest.mark.parametrize(
    "there, argv, device, local_size, machines",
    [
        (8, ["--num-gpus", 8], "cuda", 8, 1),
        (8, ["--num-gpus", 2, "--dist-timeout", 7], "cuda", 2, 1),
        (1, ["--num-machines", 2, "--dist-url", "tcp://127.0.0.1:0"], "cuda", 1, 2),
        (2, ["--cpu-processes", 3], "cpu", 3, 1),
        (0, ["--cpu-processes", 1], "cpu", 1, 1),
        (0, ["--cpu-processes", 2, "--num-machines", 2, "--dist-url", "tcp://127.0.0.1:0"], "cpu", 2, 2),
    ],
)
def test_several_processes(monkeypatch, started, there, argv, device, local_size, machines):
    gpus(monkeypatch, there)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    before = dict(os.environ)
    assert run(*argv) == []
    (call,) = started
    assert (call["processes"], call["num_machines"], call["machine_rank"]) == (local_size, machines, 0)
    assert call["host"] == "127.0.0.1" and call["port"] > 0
    assert call["timeout"].total_seconds() == (7 if "--dist-timeout" in argv else 30) * 60
    if device == "cpu":
        assert call["environment"]["CUDA_VISIBLE_DEVICES"] == ""
        assert call["environment"]["OMP_NUM_THREADS"] == str(7 // local_size)
    assert dict(os.environ) == before
    # The rank finds what the agent will tell it: the flags that it was started with do not contradict that.
    torchrun._check_flags(call["args"][1], local_size * machines, local_size)


def test_a_machine_that_is_not_the_first_opens_no_store(monkeypatch, started):
    monkeypatch.setattr(processes.dist, "TCPStore", lambda *_, **options: pytest.fail("opened"))
    run("--cpu-processes", 2, "--num-machines", 3, "--machine-rank", 2, "--dist-url", "tcp://[::1]:29500")
    (call,) = started
    assert (call["host"], call["port"], call["machine_rank"]) == ("::1", 29500, 2)


def test_trainings_on_one_machine_have_ports_of_their_own(monkeypatch):
    taken = []

    def run_ranks(program, args, port, **options):
        taken.append(port)
        if len(taken) < 2:
            run("--cpu-processes", 2)  # while the first still runs
        return 0

    monkeypatch.setattr(processes, "run_ranks", run_ranks)
    run("--cpu-processes", 2)
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
        (
            0,
            ["--cpu-processes", 2, "--dist-url", "tcp://127.0.0.1:99999"],
            "cuda",
            "--dist-url tcp://127.0.0.1:99999: ",
        ),
        (0, ["--cpu-processes", 2, "--dist-url", "file:///a"], "cuda", "--dist-url file:///a: .*tcp://HOST:PORT"),
        (0, ["--cpu-processes", 2, "--dist-url", "tcp://a"], "cuda", "--dist-url tcp://a: .*tcp://HOST:PORT"),
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
    monkeypatch.setattr(torchrun, "_shared_store", lambda rank, timeout: None)
    monkeypatch.setattr(torchrun, "fresh_store", lambda store, *args: None)
    monkeypatch.setattr(torchrun.ranks, "connect", lambda store: None)
    monkeypatch.setattr(torchrun.ranks, "join", lambda store, **options: joined.append(options))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: joined.append("left"))
    return joined


@pytest.mark.parametrize("there, device, used", [(4, "cuda", "cuda"), (4, "cpu", "cpu"), (0, "cuda", "cpu")])
def test_a_rank_of_torchrun(monkeypatch, join, there, device, used):
    gpus(monkeypatch, there)
    set_torchrun(monkeypatch, GROUP_RANK=1)
    for argv in ([], ["--num-gpus", 4, "--num-machines", 2, "--machine-rank", 1], ["--dist-timeout", "7"]):
        assert len(run(*argv, device=device)) == 1
        minutes = 7 if "--dist-timeout" in argv else 30
        expected = {"rank": 5, "world_size": 8, "local_rank": 1, "local_size": 4, "device": used}
        assert join.pop() == "left"
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
    with pytest.raises(UserError, match=f"rank {rank}: .* 2 ranks .*--dist-timeout"):
        fresh_store(dist.HashStore(), rank, 2, timedelta(seconds=0.2))


# ---------------------------------------------------------------------- real ranks
PROGRAM = """
import multiprocessing, os
import torch, torch.distributed as dist
from detectron2.utils import comm
from mgd_det.cli.error_reports import run_in_processes
from mgd_det.cli.yaml_setup import argument_parser

def main(args):
    total = torch.ones(1) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    workers = multiprocessing.get_start_method()  # of data loaders
    seen = f"SEEN {dist.get_backend()} {dist.get_world_size()} {comm.get_local_rank()} {int(total)} {workers}"
    os.write(1, f"{seen}\\n".encode())  # at once: print may write in pieces, which mix with those of the other rank
    assert not torch.cuda.is_available() and torch.get_num_threads() == 1
    if dist.get_rank() == 1:
        raise RuntimeError("a bug of rank 1")
    dist.all_reduce(total)

def device(args):
    return "cuda"

if __name__ == "__main__":
    run_in_processes(main, argument_parser().parse_args(), device)
"""


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_and_is_shown_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, str(program), "--cpu-processes", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    seen = sorted(line for line in result.stdout.splitlines() if line.startswith("SEEN"))
    workers = multiprocessing.get_start_method()
    assert seen == [f"SEEN gloo 2 0 3 {workers}", f"SEEN gloo 2 1 3 {workers}"], result.stderr
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "RuntimeError: a bug of rank 1", result.stderr
    assert result.stderr.count("Traceback") == 1, result.stderr


def test_a_port_that_torch_cannot_share_is_not_used(monkeypatch):
    """torch fails to share a port of which this process has had a store before."""
    free = iter([7, 8])

    class Store:
        def __init__(self, host, port, **options):
            if port == 7:
                raise dist.DistNetworkError("address already in use")
            self.port = port or next(free)

    monkeypatch.setattr(dist, "TCPStore", Store)
    assert processes.open_store("a", 0, timedelta(minutes=1)).port == 8
    with pytest.raises(dist.DistNetworkError):
        processes.open_store("a", 7, timedelta(minutes=1))
