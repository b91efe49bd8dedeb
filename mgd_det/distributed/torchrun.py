"""Ranks that torchrun, or a script that sets its variables, has started."""

import argparse
import json
import os
import time
import uuid
from datetime import timedelta
from typing import Callable, Optional

import torch
import torch.distributed as dist
from detectron2.utils import comm

from mgd_det.checkpoint.resumable import LAST_CHECKPOINT
from mgd_det.distributed import ranks
from mgd_det.errors import UserError
from mgd_det.files.atomic_files import write_atomically

# What torchrun tells each process.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# In OUTPUT_DIR: what was there when torchrun first started the training.
_START = "torchrun_start.json"


def is_under_torchrun() -> bool:
    """Whether the environment makes this process a rank. Raises UserError where a part of it is missing."""
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
    """Makes this process the rank that the environment says. Collective.

    Args:
        args: of ``argument_parser``; flags for the processes may say what torchrun does, or nothing.
        device: gives the config's device.

    Raises UserError for flags, a config or a machine that contradict torchrun.
    """
    rank, world_size, local_rank, local_size = (int(os.environ[name]) for name in _VARIABLES[:4])
    timeout = timedelta(minutes=args.dist_timeout)
    store = fresh_store(_shared_store(rank, timeout), rank, world_size, timeout)
    ranks.connect(store)  # from here on, an error of all ranks is shown by one
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


def resume_after_restart(args: argparse.Namespace, output_dir: str) -> str:
    """Sets args.resume where torchrun has started this training anew after it had saved a checkpoint. Collective.

    One that an earlier training left in the folder is not resumed from.

    Returns a remark on it, or "". Raises UserError where the folder cannot be written.
    """
    if not is_under_torchrun() or args.resume or args.eval_only or args.eval_teacher:
        return ""
    # torchrun counts on each machine by itself: where one of them restarted the rest, the others have not counted.
    restarts = max(comm.all_gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    has_saved = ranks.on_main_process(lambda: _has_saved_since_start(output_dir, is_restart=restarts > 0))
    if restarts == 0:
        return ""
    if not has_saved:
        return f"Restart {restarts} by torchrun: the training begins anew, as it has not saved a checkpoint so far."
    args.resume = True
    return (
        f"Restart {restarts} by torchrun, taken as --resume: the training goes on from the last checkpoint of "
        f"{output_dir}."
    )


def _has_saved_since_start(output_dir: str, is_restart: bool) -> bool:
    """Whether the folder has a checkpoint of this training; notes at its start what an earlier one has left there."""
    run, saved = os.environ.get("TORCHELASTIC_RUN_ID", ""), _time_of_last_checkpoint(output_dir)
    path = os.path.join(output_dir, _START)
    try:
        if is_restart and os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                start = json.load(f)
            if start["run"] == run:
                return saved != start["last_checkpoint"]
        # The first start, or one before this failed too early to note anything, and so to save anything.
        content = json.dumps({"run": run, "last_checkpoint": saved}).encode()
        os.makedirs(output_dir, exist_ok=True)
        write_atomically(path, lambda f: f.write(content))
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} cannot be read: delete it") from e
    except OSError as e:
        raise UserError(f"OUTPUT_DIR (train.output_dir) {output_dir} cannot be written: {e}") from e
    return False


def _time_of_last_checkpoint(folder: str) -> Optional[int]:
    """When the file that names the last checkpoint was written, in nanoseconds; None where there is none."""
    try:
        return os.stat(os.path.join(folder, LAST_CHECKPOINT)).st_mtime_ns
    except FileNotFoundError:
        return None


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of ``store`` that no rank has used before. Collective.

    torchrun's store outlives a restart: what the former ranks left there, such as their addresses, must not be taken
    for that of the new. Rank 0 makes up a name and answers every rank that asks, by a word that only this one knows.

    Raises UserError where not all have come within the timeout.
    """
    deadline = time.monotonic() + timeout.total_seconds()

    def wait(is_done: Callable[[], bool]) -> None:
        while not is_done():
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {rank}: not all {world_size} ranks were there within {timeout} (--dist-timeout): look at "
                    "what the others say"
                )
            time.sleep(0.05)

    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"asking/{rank}", word)
        wait(lambda: store.check([f"answer/{word}"]))
        name = store.get(f"answer/{word}").decode()
        store.set(f"{name}/{rank}", "here")
        return dist.PrefixStore(name, store)

    name = uuid.uuid4().hex

    def answer_all() -> bool:
        for other in range(1, world_size):
            if store.check([f"asking/{other}"]):  # maybe still the former rank's word: asked again below
                store.set(f"answer/{store.get(f'asking/{other}').decode()}", name)
        return all(store.check([f"{name}/{other}"]) for other in range(1, world_size))

    wait(answer_all)
    return dist.PrefixStore(name, store)


def _shared_store(rank: int, timeout: timedelta) -> dist.Store:
    """torchrun's own store; where a script has set the variables, one of rank 0."""
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        return dist.TCPStore(address, int(port), is_master=is_master, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, ValueError) as e:
        raise UserError(
            f"MASTER_ADDR {address}, MASTER_PORT {port}: cannot be {'opened' if is_master else 'reached'}: "
            f"{(str(e).splitlines() or ['-'])[0]}"
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
