"""Start ranks by torch's elastic agent, as torchrun does."""

import logging
import multiprocessing
import os
import signal
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

logger = logging.getLogger(__name__)


def run_ranks(
    entrypoint: Callable[..., None],
    args: Tuple[Any, ...],
    *,
    processes: int,
    host: str,
    port: int,
    machine_rank: int = 0,
    num_machines: int = 1,
    timeout: timedelta = timedelta(minutes=30),
    start_method: str = "spawn",
) -> int:
    """Run ``entrypoint(*args)`` in processes of this machine, with torchrun's variables in their environment.

    When a process fails, the others of this machine get SIGTERM at once, and SIGKILL after 30 s. SIGTERM and SIGINT to
    this process are passed on to the ranks. The ranks may be saving, so there is no limit to the time they take to end.

    Args:
        entrypoint: must be importable if the start method is "spawn".
        processes: number of processes on this machine, > 0.
        host, port: address of the store on machine 0.
        timeout: how long to wait for the other machines.
        start_method: multiprocessing's; CUDA needs "spawn".

    Returns:
        0 if all processes succeed, otherwise the exit status of the first that failed: for a signal, 128 + its number.
    """
    agent = _Agent(
        WorkerSpec(
            role="rank",
            local_world_size=processes,
            entrypoint=_run_rank,
            args=(entrypoint, args),
            rdzv_handler=StaticTCPRendezvous(
                host, port, machine_rank, num_machines, "mgd_det", int(timeout.total_seconds())
            ),
            max_restarts=0,
            monitor_interval=0.1,
            master_addr=host,
            master_port=port,
        ),
        start_method,
    )
    with _silent_agent():
        try:
            failures = agent.run().failures
        except SignalException as e:  # while the processes were being started
            return 128 + e.sigval
        finally:
            agent.restore_signals()
    if not failures:
        return 0
    _, failure = ChildFailedError("rank", failures).get_first_failure()
    if failure.exitcode > 0:
        return failure.exitcode
    if not agent.received:
        name = signal.Signals(-failure.exitcode).name
        hint = ": was the machine out of memory?" if name == "SIGKILL" else ""
        logger.error(f"error: process {failure.local_rank} of this machine was ended by {name}{hint}")
    return 128 - failure.exitcode


def _run_rank(entrypoint: Callable[..., None], args: Tuple[Any, ...]) -> None:
    # By default a spawned process spawns its own children, too. The workers of every new data loader would import
    # everything again; under torchrun they are forked.
    multiprocessing.set_start_method(None, force=True)
    entrypoint(*args)


class _Agent(LocalElasticAgent):
    """torch's agent, but it gives the ranks time to save after a signal.

    The signal handlers of torch's agent kill ranks after 30 s. Only from torch 2.9 on can ``elastic_launch`` leave them
    out (``LaunchConfig.signals_to_handle``); earlier versions need this class.
    """

    def __init__(self, spec: WorkerSpec, start_method: str) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull), start_method)
        self.received: List[int] = []
        self._pids: List[int] = []
        # All signals for which torch sets a handler.
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        self._handlers = {number: signal.getsignal(number) for number in numbers}

    def _start_workers(self, worker_group: WorkerGroup) -> Dict[int, Any]:
        ids = super()._start_workers(worker_group)
        self._pids = list(ids.values())
        self.restore_signals()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        return ids

    def restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: Optional[FrameType]) -> None:
        self.received.append(number)
        for pid in self._pids:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, number)


@contextmanager
def _silent_agent() -> Iterator[None]:
    """Keep torch from logging a traceback for each failed rank: the ranks themselves say what is wrong."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing")]
    handler = logging.NullHandler()
    for log in loggers:
        log.addHandler(handler)
        log.propagate = False
    try:
        yield
    finally:
        for log in loggers:
            log.removeHandler(handler)
            log.propagate = True
