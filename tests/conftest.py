"""What tests of several rooms share."""

import itertools
import logging
import signal
import sys
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # So a shell starts what runs in the background; tests send that signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)

TIMEOUT = 60  # seconds, for all ranks together


@pytest.fixture(autouse=True)
def loggers_as_before():
    """Undo what a program that ran in this process did to the loggers: it hides messages from later tests."""
    loggers = [logging.getLogger(name) for name in ("mgd_det", "detectron2", "fvcore")]
    before = [(logger.propagate, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (logger.propagate, level, handlers) in zip(loggers, before):
        logger.setLevel(level)
        logger.handlers[:] = handlers
    if "detectron2.utils.logger" in sys.modules:
        sys.modules["detectron2.utils.logger"].setup_logger.cache_clear()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The path of a random RetinaNet's weights, see :func:`toy.save_teacher`; no test writes to it."""
    import toy  # only here: other tests do not need Detectron2

    return toy.save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture
def run_ranks(tmp_path):
    """``run_ranks(fn, world_size, *args)``: the list of ``fn(rank, *args)``, each run in a process of its own.

    The processes share a gloo group and are forked, so that ``fn`` may be a closure. What it returns must be
    picklable. A rank that raises, dies or hangs fails the test with that rank's traceback or exit code.
    """
    runs = itertools.count()

    def run(fn, world_size, *args):
        folder = tmp_path / f"ranks{next(runs)}"
        folder.mkdir()
        context = mp.get_context("fork")
        ranks = [context.Process(target=_rank, args=(fn, rank, world_size, folder, args)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + TIMEOUT
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for rank in hung:
            ranks[rank].kill()
            ranks[rank].join()
        problems = [error.read_text(encoding="utf-8") for error in sorted(folder.glob("*.error"))]
        problems += [f"rank {rank} did not finish in {TIMEOUT} s" for rank in hung]
        problems += [f"rank {rank} exited with {p.exitcode}" for rank, p in enumerate(ranks) if p.exitcode != 0]
        if problems:
            pytest.fail("\n".join(problems), pytrace=False)
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)]

    return run


def _rank(fn, rank, world_size, folder, args):
    # A forked process must not wait for its parent's threads, which it does not have.
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT / 2),
        )
        dist.barrier()  # A function that leaves the group at once would break the connections that others still make.
        torch.save(fn(rank, *args), folder / f"{rank}.result")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}", encoding="utf-8")
        raise SystemExit(1) from None
