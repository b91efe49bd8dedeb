"""How the processes that were started end, and what becomes of the others."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from mgd_det.distributed.agent import run_ranks
from mgd_det.distributed.processes import open_store
from mgd_det.engine.hooks.interruption import EXIT_INTERRUPTED


def run(*functions):
    """The status of ranks that each run one of ``functions``."""

    def act():
        functions[int(os.environ["LOCAL_RANK"])]()

    store = open_store("127.0.0.1", 0, timedelta(minutes=1))
    # Forked processes need not import anything.
    return run_ranks(act, (), processes=len(functions), host="127.0.0.1", port=store.port, start_method="fork")


def hang():
    time.sleep(600)


def fail():
    sys.exit(3)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_find_the_variables_of_torchrun(tmp_path):
    def write():
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE")
        rank = os.environ["LOCAL_RANK"]
        dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False).set(rank, rank)
        (tmp_path / rank).write_text(" ".join(os.environ[name] for name in names))

    assert run(write, write) == 0
    assert (tmp_path / "0").read_text() == "0 2 2 0 127.0.0.1 True"
    assert (tmp_path / "1").read_text() == "1 2 2 0 127.0.0.1 True"


@pytest.mark.parametrize("act, status, named", [(fail, 3, ""), (be_killed, 128 + signal.SIGKILL, "SIGKILL")])
def test_one_fails_and_the_others_do_not_hang(caplog, capfd, act, status, named):
    begin = time.monotonic()
    assert run(hang, act, hang) == status
    assert time.monotonic() - begin < 20
    assert ("process 1 of this machine was ended by SIGKILL" in caplog.text) == bool(named)
    assert "Traceback" not in capfd.readouterr().err + caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_saving_may_take_its_time(tmp_path, caplog, number):
    def save_at_signal():
        def save(*_):
            time.sleep(1)
            (tmp_path / os.environ["RANK"]).write_text("saved")
            sys.exit(EXIT_INTERRUPTED)

        signal.signal(number, save)
        (tmp_path / f"{os.environ['RANK']}.ready").touch()
        time.sleep(600)

    def interrupt():
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.05)
        time.sleep(0.5)  # until the agent has left the start behind
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    assert run(save_at_signal, save_at_signal) == EXIT_INTERRUPTED
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
    assert signal.getsignal(number) is before and not [r for r in caplog.records if r.name.startswith("mgd_det")]
