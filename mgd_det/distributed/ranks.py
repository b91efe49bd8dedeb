"""What the processes of one training (its ranks) do together: join, share a result, report one error.

This module adds what Detectron2's ``comm`` lacks: processes on the CPU, a long wait for the main process, and a single
error message if several ranks fail.
"""

import itertools
import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import Any, Callable, NoReturn, Optional, Tuple, TypeVar

import torch
import torch.distributed as dist
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from torch import nn

from mgd_det.distributed.sync_batch_norm import use_cpu_sync_batch_norm
from mgd_det.errors import UserError

Result = TypeVar("Result")

# Shared by the ranks of a job, for notes outside of collectives; None if this process is not a rank.
_store: Optional[dist.Store] = None
_waits = itertools.count()


def connect(store: dist.Store) -> None:
    """Keep ``store``, which all ranks of the job share, for notes between them."""
    global _store
    _store = dist.PrefixStore("mgd_det", store)


def join(
    store: dist.Store,
    *,
    rank: int,
    local_rank: int,
    world_size: int,
    local_size: int,
    device: str,
    timeout: timedelta,
) -> None:
    """Make this process a rank: torch's default group, Detectron2's group of the machine, the GPU. Collective.

    Args:
        store: where the ranks find each other, the same for all of them.
        rank: in [0, world_size); ranks of one machine are consecutive.
        local_rank: in [0, local_size), on this machine; also the number of its GPU.
        device: "cuda" (NCCL) or "cpu" (gloo).
        timeout: limit of a collective.

    Raises:
        UserError: the machines run different numbers of ranks.
    """
    connect(store)
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("ranks", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    sizes = comm.all_gather(local_size)
    if len(set(sizes)) > 1:
        raise UserError(
            f"the machines run different numbers of processes ({', '.join(map(str, sorted(set(sizes))))}): give the "
            "same --nproc-per-node to torchrun on each of them"
        )
    comm.create_local_process_group(local_size)
    comm.synchronize()


def distributed(model: nn.Module, **options: Any) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several ranks, on GPUs or on the CPU.

    On the CPU, its nn.SyncBatchNorm layers are made to work too; torch's own do not.

    Args:
        options: arguments of Detectron2's ``create_ddp_model``; ``broadcast_buffers`` is False by default.
    """
    on_gpu = next(model.parameters()).is_cuda
    if not on_gpu and dist.is_initialized():
        use_cpu_sync_batch_norm(model)
    if comm.get_world_size() == 1:
        return model
    # On the CPU, DistributedDataParallel takes no device_ids.
    options = {"broadcast_buffers": False, "device_ids": [comm.get_local_rank()] if on_gpu else None, **options}
    return create_ddp_model(model, **options)


def share_buffers(module: nn.Module) -> None:
    """Give every rank the main process's floating-point buffers, such as batch norm's statistics. Collective.

    A checkpoint holds the main process's, too.
    """
    buffers = [b for b in module.buffers() if b.is_floating_point() and b.numel() > 0]
    if comm.get_world_size() == 1 or not buffers:
        return
    values = torch.cat([b.detach().flatten().double() for b in buffers])
    dist.broadcast(values, src=0)
    for buffer, value in zip(buffers, values.split([b.numel() for b in buffers])):
        buffer.copy_(value.view_as(buffer))


def on_main_process(function: Callable[[], Result]) -> Result:
    """Run a function on the main process only; every rank gets its result or its UserError. Collective.

    The other ranks wait without a time limit.

    Raises:
        UserError: ``function`` raised it.
        RuntimeError: another rank failed for a different reason while this one waited.
    """
    if comm.get_world_size() == 1:
        return function()
    outcome: Tuple[Optional[Result], Optional[UserError]] = (None, None)
    if comm.is_main_process():
        try:
            outcome = (function(), None)
        except UserError as e:
            outcome = (None, e)
    _wait_for_main_process()
    result, error = comm.all_gather(outcome)[0]
    if error is not None:
        raise error
    return result


def _wait_for_main_process() -> None:
    if _store is None:  # another program made these ranks
        return
    done = f"main process done {next(_waits)}"
    if comm.is_main_process():
        _store.set(done, "yes")
    while not _store.check([done]):
        # The store outlives the ranks, and a rank that has failed will never set the key.
        if has_failed_rank():
            raise RuntimeError("another rank failed while this one waited for the main process")
        time.sleep(0.2)


def is_rank() -> bool:
    """Tell whether this process has joined others by :func:`connect`."""
    return _store is not None


def is_first_to_fail() -> bool:
    """Note that this process fails, and return whether it is the first rank of the job to fail (True if alone).

    The other ranks fail for the same reason or because the first is gone, so their messages would only distract.
    """
    if _store is None:
        return True
    if threading.current_thread() is threading.main_thread():
        # After one rank has ended, the launcher ends the others; it must not cut the message off.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return _store.add("failed ranks", 1) == 1
    except RuntimeError:
        # The process with the store is gone; on another machine, nobody may have seen why.
        return True


def has_failed_rank() -> bool:
    """Tell whether any rank of the job called :func:`is_first_to_fail`; False if the store is gone."""
    if _store is None:
        return False
    try:
        return _store.check(["failed ranks"])
    except RuntimeError:
        return False


def leave(status: int) -> NoReturn:
    """End this process. A rank ends at once, because threads of a failed collective could keep Python from exiting."""
    if _store is None:
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
