"""Start the processes of a training: one for each GPU, or several on the CPU; or join those of torchrun."""

import argparse
import logging
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, Optional, Tuple
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from mgd_det.distributed import torchrun
from mgd_det.distributed.agent import run_ranks
from mgd_det.errors import UserError, first_line

logger = logging.getLogger(__name__)

Main = Callable[[argparse.Namespace], None]
Device = Callable[[argparse.Namespace], str]
Program = Callable[[Main, argparse.Namespace, Device], None]


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add this project's flags to those of Detectron2 (--num-gpus, --num-machines, --machine-rank, --dist-url)."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--cpu-processes", type=int, metavar="N", help="N processes on the CPU of each machine, no GPU")
    group.add_argument(
        "--dist-timeout", type=float, default=30, metavar="MINUTES", help="limit of a collective (default: 30)"
    )
    parser.set_defaults(dist_url="auto")  # a free port, so that trainings on one machine do not collide


def launch(main: Main, args: argparse.Namespace, device: Device, program: Program) -> None:
    """Run ``main(args)`` in every process that the command line or torchrun asks for.

    Processes that this function starts find torchrun's variables in their environment and run ``program``, which calls
    this function again. A rank therefore runs the same code, no matter who started it.

    Args:
        main: the work of one rank.
        args: from :func:`mgd_det.cli.yaml_setup.argument_parser`.
        device: returns the config's device ("cuda", "cpu") for ``args``; called only if it matters.
        program: reports the errors of this function. A started process calls ``program(main, args, device)``, so all
            four must be importable there.

    Raises:
        UserError: the flags contradict each other, the machine, the config or torchrun.
        SystemExit: a started process failed; the status is that of the first, 128 + its number for a signal.
    """
    if args.dist_timeout <= 0:
        raise UserError(f"--dist-timeout is {args.dist_timeout:g}: give minutes > 0")
    if torchrun.is_under_torchrun():
        torchrun.join(args, lambda: device(args))
        main(args)
        dist.destroy_process_group()
        return
    on_gpu, processes = _local_ranks(args)
    if processes * args.num_machines == 1 and args.cpu_processes is None:
        main(args)
        return
    if on_gpu and device(args) != "cuda":
        raise UserError(
            f"the config's device is {device(args)!r}, but --num-gpus {args.num_gpus} on {args.num_machines} "
            'machine(s) needs "cuda"; for processes on the CPU, give --cpu-processes'
        )
    timeout = timedelta(minutes=args.dist_timeout)
    rank_args = argparse.Namespace(**{**vars(args), "dist_url": "auto"})  # ranks meet by torchrun's variables
    with _environment_of_ranks(on_gpu, processes), _address(args, timeout) as (host, port):
        status = run_ranks(
            program,
            (main, rank_args, device),
            processes=processes,
            host=host,
            port=port,
            machine_rank=args.machine_rank,
            num_machines=args.num_machines,
            timeout=timeout,
        )
    if status != 0:
        sys.exit(status)


def _local_ranks(args: argparse.Namespace) -> Tuple[bool, int]:
    """Return whether the ranks run on GPUs, and how many run on this machine; check the flags against the machine."""
    if args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank is {args.machine_rank} of --num-machines {args.num_machines}: number the machines from 0"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--num-machines: give --dist-url tcp://HOST:PORT, of machine 0 and the same on every machine")
    if args.cpu_processes is not None:
        if args.cpu_processes < 1 or args.num_gpus > 1:
            raise UserError(
                f"--cpu-processes is {args.cpu_processes} with --num-gpus {args.num_gpus}: give one of them, > 0"
            )
        return False, args.cpu_processes
    there = torch.cuda.device_count()
    if args.num_gpus > there > 0:
        raise UserError(f"--num-gpus is {args.num_gpus}, but this machine has {there} that torch can use")
    if there > 0:
        return True, max(args.num_gpus, 1)
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
    return False, 1


@contextmanager
def _environment_of_ranks(on_gpu: bool, processes: int) -> Iterator[None]:
    """Set the variables that a rank must find before it imports torch."""
    if on_gpu:
        yield
        return
    before = dict(os.environ)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # By default, each process has as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _address(args: argparse.Namespace, timeout: timedelta) -> Iterator[Tuple[str, int]]:
    """Give the host and port where the machines meet; errors of meeting there name --dist-url.

    Machine 0 opens the store here, and torch's agent in the same process shares it by its port, so no other training
    can take a free port in between. The store outlives every rank, so the last one can still read it.
    """
    url = urlparse("tcp://127.0.0.1:0" if args.dist_url == "auto" else args.dist_url)
    store: Optional[dist.Store] = None
    try:
        if url.scheme != "tcp" or not url.hostname or url.port is None:
            raise ValueError("it is not tcp://HOST:PORT")
        host, port = url.hostname, url.port
        if args.machine_rank == 0:
            store = open_store(host, port, timeout)
            port = store.port
        yield host, port
    except (RuntimeError, ValueError) as e:  # of the store, here or in the agent
        problem = "cannot be opened on this machine" if args.machine_rank == 0 else "machine 0 cannot be reached"
        raise UserError(
            f"--dist-url {args.dist_url}: {problem}: {first_line(e)}. Give an address of machine 0 and a port that is "
            "open there, the same on every machine, and start machine 0"
        ) from e
    del store


def open_store(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """Open a store that others in this process can share by its port.

    Args:
        port: 0 for a free one.

    Raises:
        RuntimeError: the address cannot be opened.
    """
    options: Dict[str, Any] = dict(is_master=True, wait_for_workers=False, timeout=timeout, multi_tenant=True)
    while True:
        store = dist.TCPStore(host, port, **options)
        if port:
            return store
        try:
            # torch keeps an entry of each port that a store of this process has had. If the system gives such a port
            # again, torch cannot share it: it finds the closed store and tries to open the port a second time.
            dist.TCPStore(host, store.port, **options)
        except RuntimeError:
            continue
        return store
