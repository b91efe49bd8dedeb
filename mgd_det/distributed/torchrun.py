"""Join the ranks of a training by the environment variables of torchrun."""

import argparse
import os
import time
import uuid
from datetime import timedelta
from typing import Callable

import torch
import torch.distributed as dist

from mgd_det.distributed import ranks
from mgd_det.errors import UserError, first_line

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_under_torchrun() -> bool:
    """Tell whether the environment makes this process a rank.

    Raises:
        UserError: some of torchrun's variables are missing.
    """
    there = [name for name in _VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(there):
        return False
    missing = [name for name in _VARIABLES if name not in there]
    if missing:
        raise UserError(
            f"the environment has {', '.join(there)}, as torchrun sets them, but lacks {missing[0]}: set it"
        )
    return True


def join(args: argparse.Namespace, device: Callable[[], str]) -> None:
    """Make this process the rank that the environment names. Collective.

    Args:
        args: the program's; its flags for processes may be left out, or repeat what torchrun was told.
        device: returns the config's device.

    Raises:
        UserError: flags, config or machine contradict torchrun, or not all ranks have come in time.
    """
    rank, world_size, local_rank, local_size = (int(os.environ[name]) for name in _VARIABLES[:4])
    timeout = timedelta(minutes=args.dist_timeout)
    store = fresh_store(_shared_store(rank, timeout), rank, world_size, timeout)
    ranks.connect(store)  # from here on, only one rank shows an error
    _check_flags(args, world_size, local_size)
    ranks.join(
        store,
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_size=local_size,
        device=_rank_device(device(), world_size, local_size),
        timeout=timeout,
    )


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Agree on a part of ``store`` that no rank has used before. Collective.

    torchrun's store outlives a restart. New ranks would use the addresses that the old ranks left there, as
    ``init_process_group("env://")`` does: https://github.com/pytorch/pytorch/issues/135712. That issue is closed, but
    torch 2.14.1 still shows the error: it no longer adds a prefix for each attempt, because it means to open a new
    store each time, but then keeps the first one (``DynamicRendezvousHandler._bootstrap_store_info``).
    TORCHELASTIC_RESTART_COUNT cannot be the prefix, because each machine has a count of its own.

    So rank 0 makes up a name and gives it to each rank that asks with a unique word. Words of old ranks may be answered
    too, but nobody reads those answers.

    Raises:
        UserError: not all ranks connected within the timeout.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def pause() -> None:
        if time.monotonic() > deadline:
            raise UserError(
                f"rank {rank}: not all {world_size} ranks connected within {timeout} (--dist-timeout): read the logs "
                "of the others"
            )
        time.sleep(0.05)

    if rank == 0:
        while store.add(name, 0) < world_size - 1:
            for question in (f"question of rank {other}" for other in range(1, world_size)):
                if store.check([question]):
                    store.set(store.get(question).decode(), name)
            pause()
    else:
        word = uuid.uuid4().hex
        store.set(f"question of rank {rank}", word)
        while not store.check([word]):
            pause()
        name = store.get(word).decode()
        store.add(name, 1)
    return dist.PrefixStore(name, store)


def _shared_store(rank: int, timeout: timedelta) -> dist.Store:
    """Connect to the agent's store, or to one that rank 0 opens if a script, not torchrun, has set the variables."""
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        return dist.TCPStore(address, int(port), is_master=is_master, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, ValueError) as e:
        raise UserError(
            f"MASTER_ADDR {address}, MASTER_PORT {port}: cannot be {'opened' if is_master else 'reached'}: "
            f"{first_line(e)}"
        ) from e


def _check_flags(args: argparse.Namespace, world_size: int, local_size: int) -> None:
    for flag, given, default, actual in (
        ("--num-gpus", args.num_gpus, 1, local_size),
        ("--cpu-processes", args.cpu_processes, None, local_size),
        ("--num-machines", args.num_machines, 1, world_size // local_size),
        ("--machine-rank", args.machine_rank, 0, int(os.environ.get("GROUP_RANK", 0))),
        ("--dist-url", args.dist_url, "auto", "auto"),
    ):
        if given not in (default, actual):
            raise UserError(
                f"{flag} is {given}, but torchrun has started {local_size} process(es) on this machine, {world_size} "
                f"in all: leave {flag} out"
            )


def _rank_device(device: str, world_size: int, local_size: int) -> str:
    there = torch.cuda.device_count()
    if there == 0 or not device.startswith("cuda"):
        return "cpu"
    if local_size > there:
        raise UserError(
            f"torchrun has started {local_size} processes on a machine where each sees {there} GPU(s): give "
            f'--nproc-per-node {there}, CUDA_VISIBLE_DEVICES="" to train on the CPU, or under SLURM --gpus-per-node '
            "instead of --gpus-per-task"
        )
    if world_size > 1 and device != "cuda":
        raise UserError(f'the config\'s device is {device!r}, for {world_size} processes: set it to "cuda"')
    return "cuda"
