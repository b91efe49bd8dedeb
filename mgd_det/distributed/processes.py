"""Starting the processes of a training: one for each GPU, some on the CPU, or those that torchrun has started."""

import argparse
import logging
import os
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable, Iterator, Optional, Tuple
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mgd_det.cli.error_reports import run_program
from mgd_det.distributed import ranks, torchrun
from mgd_det.distributed.supervision import supervise
from mgd_det.errors import UserError

logger = logging.getLogger(__name__)

Main = Callable[[argparse.Namespace], None]


@dataclass(frozen=True)
class _Job:
    """The processes to start on this machine."""

    device: str  # "cuda" or "cpu"
    processes: int
    num_machines: int
    machine_rank: int
    url: str
    timeout: timedelta

    @property
    def world_size(self) -> int:
        return self.processes * self.num_machines


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Adds to Detectron2's flags (--num-gpus, --num-machines, --machine-rank, --dist-url) those of this project."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--cpu-processes", type=int, metavar="N", help="N processes on the CPU of each machine, no GPU")
    group.add_argument(
        "--dist-timeout", type=float, default=30, metavar="MINUTES", help="limit of a collective (default: 30)"
    )
    parser.set_defaults(dist_url="auto")  # a free port, so that two trainings on one machine do not meet


def launch(main: Main, args: argparse.Namespace, device: Callable[[], str]) -> None:
    """Runs ``main(args)`` in every process that the command line, or torchrun, asks for.

    Where a process fails, its error is shown, and no other. The processes of this machine have ended within three
    times :data:`mgd_det.distributed.supervision.GRACE`, those of other machines when their next collective fails (gloo:
    at once; NCCL: after --dist-timeout).

    Args:
        main: of one rank; importable, as processes are spawned.
        args: of :func:`mgd_det.cli.yaml_setup.argument_parser`.
        device: gives the config's device ("cuda", "cpu"); asked where there is a choice.

    Raises:
        UserError: flags that contradict each other, the machine, the config or torchrun.
        SystemExit: with the exit status of the process that failed first; 128 + its number for a signal.
    """
    if args.dist_timeout <= 0:
        raise UserError(f"--dist-timeout is {args.dist_timeout:g}: give minutes > 0")
    if torchrun.is_under_torchrun():

        def join_and_run() -> None:
            torchrun.join(args, device)
            main(args)

        _run_rank(join_and_run)
        return
    job = _job(args, device)
    if job is None:
        main(args)
        return
    with _environment_of_ranks(job), _local_store(job) as job_with_store:
        context = mp.start_processes(_spawned, (main, args, job_with_store), nprocs=job.processes, join=False)
        status = supervise(context.processes)
    if status != 0:
        sys.exit(status)


# ---------------------------------------------------------------------- started here
def _job(args: argparse.Namespace, device: Callable[[], str]) -> Optional[_Job]:
    """The processes that the flags ask for, checked against the machine; None for this process alone."""
    if args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank is {args.machine_rank} of --num-machines {args.num_machines}: number the machines from 0"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--num-machines: give --dist-url tcp://HOST:PORT, of machine 0 and the same on every machine")
    kind, processes = _processes(args)
    if processes * args.num_machines == 1 and args.cpu_processes is None:
        return None
    if kind == "cuda" and device() != "cuda":
        raise UserError(
            f"the config's device is {device()!r}, but --num-gpus {args.num_gpus} on {args.num_machines} machine(s) "
            'wants "cuda"; for processes on the CPU, give --cpu-processes'
        )
    timeout = timedelta(minutes=args.dist_timeout)
    return _Job(kind, processes, args.num_machines, args.machine_rank, args.dist_url, timeout)


def _processes(args: argparse.Namespace) -> Tuple[str, int]:
    if args.cpu_processes is not None:
        if args.cpu_processes < 1 or args.num_gpus > 1:
            raise UserError(
                f"--cpu-processes is {args.cpu_processes} with --num-gpus {args.num_gpus}: give one of them, > 0"
            )
        return "cpu", args.cpu_processes
    there = torch.cuda.device_count()
    if args.num_gpus > there > 0:
        raise UserError(f"--num-gpus is {args.num_gpus}, but this machine has {there} that torch can use")
    if there > 0:
        return "cuda", max(args.num_gpus, 1)
    if args.num_machines > 1:
        raise UserError(
            "--num-machines: this machine has no GPU that torch can use; for processes on the CPU, give "
            "--cpu-processes, the same on every machine"
        )
    if args.num_gpus > 1:
        logger.warning(
            f"warning: --num-gpus is {args.num_gpus}, but there is no GPU: one process on the CPU "
            f"(--cpu-processes {args.num_gpus} makes it {args.num_gpus})"
        )
    return "cpu", 1


@contextmanager
def _environment_of_ranks(job: _Job) -> Iterator[None]:
    """What processes have to find before they import torch."""
    if job.device == "cuda":
        yield
        return
    before = dict(os.environ)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Else each process has as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // job.processes, 1)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _local_store(job: _Job) -> Iterator[_Job]:
    """Holds the store of a tcp:// URL in this process, which outlives every rank: the last can still read it."""
    url = urlparse("tcp://127.0.0.1:0" if job.url == "auto" else job.url)
    if url.scheme != "tcp" or job.machine_rank != 0:
        yield job
        return
    try:
        store = dist.TCPStore(
            url.hostname or "", url.port or 0, is_master=True, wait_for_workers=False, timeout=job.timeout
        )
    except (RuntimeError, ValueError) as e:
        raise UserError(f"--dist-url {job.url}: cannot be opened on this machine: {_first_line(e)}") from e
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname  # an address of IPv6
    yield _Job(**{**vars(job), "url": f"tcp://{host}:{store.port}"})
    del store


def _spawned(local_rank: int, main: Main, args: argparse.Namespace, job: _Job) -> None:
    _run_rank(lambda: _join_job(local_rank, main, args, job))


def _join_job(local_rank: int, main: Main, args: argparse.Namespace, job: _Job) -> None:
    rank = job.machine_rank * job.processes + local_rank
    ranks.join(
        _connected(job, rank),
        rank=rank,
        local_rank=local_rank,
        world_size=job.world_size,
        local_size=job.processes,
        device=job.device,
        timeout=job.timeout,
    )
    main(args)


def _connected(job: _Job, rank: int) -> dist.Store:
    url = urlparse(job.url)
    try:
        if url.scheme == "tcp":
            return dist.TCPStore(url.hostname or "", url.port or 0, is_master=False, timeout=job.timeout)
        return next(dist.rendezvous(job.url, rank, job.world_size, timeout=job.timeout))[0]
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(
            f"--dist-url {job.url}: machine 0 cannot be reached from machine {job.machine_rank}: {_first_line(e)}. Is "
            "it started, the address its own, the port open?"
        ) from e


# ---------------------------------------------------------------------- one rank
def _run_rank(main: Callable[[], None]) -> None:
    """Runs a rank to its end. A failing one leaves at once: threads of a collective could keep Python from exiting."""
    status = 1
    try:
        run_program(main)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        if ranks.is_first_to_fail():
            traceback.print_exc()
    if status == 0:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
