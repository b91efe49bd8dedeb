#!/usr/bin/env python
"""Kill trainings and compare the results with those of undisturbed trainings. `make soak`; about ten minutes.

python dev/soak.py [--kills 20] [--seed 0] [--work-dir DIR]

1. One process: SIGKILL at random moments, every other one while a checkpoint is being written, each followed by
   --resume. The weights, the optimizer and the matching at the end are those of a training in one go, bit by bit.
2. Two processes by torchrun, with --resume: one rank is killed, torchrun starts the group again, which continues from
   the last checkpoint. The results are equal as well.
3. Two processes by --cpu-processes: one rank is killed, both end, and the same command with --resume completes the
   training. The results are equal as well.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import toy  # noqa: E402

from mgd_det.cli.arguments import positive  # noqa: E402

ITERATIONS = 240
RANKS_ITERATIONS = 60
WAIT = 180  # seconds for a process to start, or to end
RESUMED = re.compile(r"Starting training from iteration (\d+)")


class SoakError(Exception):
    """A training that hangs, fails, or ends with another result."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive, default=20, metavar="N", help="kills of one process (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--work-dir", metavar="DIR", help="keep the files here (default: a temporary folder)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------- trainings
def training(flags, teacher, output, iterations):
    """Arguments of tools/train_net.py: a small distilled RetinaNet, with checkpoints all the time."""
    opts = ["SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", 4, "SEED", 1]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.CHECKPOINTS_KEPT", 4, "DATASETS.TEST", "()", "OUTPUT_DIR", output]
    opts += ["DATALOADER.NUM_WORKERS", 1, "MODEL.DEVICE", "cpu", "MODEL.MGD.MATCHING.PERIODS", "[25]"]
    distilled = [*toy.plain_opts(), *toy.distilled_opts(teacher)]
    return [str(a) for a in ["--config-file", toy.RETINANET, *flags[:4], *distilled, *opts]]


def program(*arguments):
    return [sys.executable, str(ROOT / "tools" / "train_net.py"), *arguments]


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "--max-restarts", "3", str(ROOT / "tools" / "train_net.py"), "--resume", *arguments]


def two_processes(*arguments):
    return program("--cpu-processes", "2", "--resume", *arguments)


def start(command, log):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def finish(process, log):
    try:
        status = process.wait(timeout=10 * WAIT)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise SoakError(f"a training hangs; its log is {log}") from None
    if status != 0:
        raise SoakError(f"a training ended with status {status}; its log is {log}")


def kill_all(process):
    """Kill the process and what it started: nothing is left to hold a port or a file."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait_for(condition, process, log, seconds=WAIT):
    """Wait until ``condition`` returns something true, and return it; None if the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        if process.poll() is not None:
            return None
        time.sleep(0.0005)
    kill_all(process)
    raise SoakError(f"nothing happened in {seconds} s; the log is {log}")


def partial_files(folder):
    return list(Path(folder).glob("*.mgd_partial"))


def starts_in(log):
    return RESUMED.findall(Path(log).read_text(errors="replace"))


# ---------------------------------------------------------------------- the two soaks
def killed_training(arguments, output, log, kills, rng):
    """Run the training to its end with kills; return a row for each: where it resumed, whether it was in a write."""
    rows = []
    for k in tqdm(range(kills), desc="kills", unit="kill"):
        begun = len(starts_in(log)) if log.exists() else 0
        process = start(program("--resume", *arguments), log)
        wait_for(lambda seen=begun: len(starts_in(log)) > seen, process, log)
        time.sleep(rng.uniform(0, 4))
        if k % 2:
            wait_for(lambda: partial_files(output), process, log)
        ended = process.poll()
        kill_all(process)
        if ended is not None:
            raise SoakError(f"the training ended with status {ended} after {k} kills; its log is {log}")
        rows.append([k + 1, starts_in(log)[-1], "yes" if partial_files(output) else "no"])
    finish(start(program("--resume", *arguments), log), log)
    return rows


def killed_rank(command, output, log):
    """Start two ranks and kill rank 1 after some checkpoints. Returns the process that started them."""
    process = start(command, log)
    enough = f"model_{RANKS_ITERATIONS // 3 // 3 * 3 - 1:07d}.pth"
    if not wait_for(lambda: (Path(output) / enough).exists(), process, log):
        raise SoakError(f"the ranks ended early; their log is {log}")
    os.kill(rank_process(process.pid, rank=1), signal.SIGKILL)
    return process


def rank_process(agent, rank):
    """The process of a rank among an agent's children, which are started in the order of their ranks."""
    children = [int(child) for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    # Besides ranks, multiprocessing has a process of its own.
    ranks = [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sorted(ranks)[rank]


def compare(one, other):
    """Return the names of what differs between two checkpoints."""
    differing = []

    def walk(a, b, name):
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                differing.append(f"{name}: {sorted(map(str, a.keys() ^ b.keys()))[:3]}")
            for key in a.keys() & b.keys():
                walk(a[key], b[key], f"{name}.{key}")
        elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            for i, pair in enumerate(zip(a, b)):
                walk(*pair, f"{name}[{i}]")
        elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.shape != b.shape or not torch.equal(a, b):
                differing.append(name)
        elif a != b:
            differing.append(name)

    walk(torch.load(one, weights_only=True), torch.load(other, weights_only=True), "checkpoint")
    return differing


def check_equal(whole, killed):
    differing = compare(whole / "model_final.pth", killed / "model_final.pth")
    if differing:
        raise SoakError(f"{len(differing)} entries of {killed} differ from {whole}, first {differing[:3]}")


def soak(args, folder):
    rng = random.Random(args.seed)
    flags = toy.write_scenes(folder / "scenes")
    teacher = toy.save_teacher(folder / "teacher.pth")
    iterations = max(ITERATIONS * args.kills // 20, 12)
    began = time.monotonic()
    print(f"In one go: {iterations} iterations")
    finish(
        start(program(*training(flags, teacher, folder / "whole", iterations)), folder / "whole.log"),
        folder / "whole.log",
    )
    (folder / "killed").mkdir(exist_ok=True)
    rows = killed_training(
        training(flags, teacher, folder / "killed", iterations),
        folder / "killed",
        folder / "killed.log",
        args.kills,
        rng,
    )
    print(tabulate(rows, headers=["kill", "had resumed from", "while a checkpoint was written"]))
    check_equal(folder / "whole", folder / "killed")
    in_write = sum(row[2] == "yes" for row in rows)
    print(f"One process: {len(rows)} kills, {in_write} of them in a write: all that is saved is equal, bit by bit.")

    print("Two processes, one of them killed")
    whole, killed, again = folder / "ranks", folder / "ranks_torchrun", folder / "ranks_again"
    log = folder / "ranks.log"
    finish(start(torchrun(*training(flags, teacher, whole, RANKS_ITERATIONS)), log), log)

    log = folder / "ranks_torchrun.log"
    finish(killed_rank(torchrun(*training(flags, teacher, killed, RANKS_ITERATIONS)), killed, log), log)
    check_equal(whole, killed)
    print(f"torchrun started both again at iteration {starts_in(log)[-1]}: all that is saved is equal, bit by bit.")

    log = folder / "ranks_again.log"
    command = two_processes(*training(flags, teacher, again, RANKS_ITERATIONS))
    status = killed_rank(command, again, log).wait(timeout=WAIT)
    if status != 128 + signal.SIGKILL:
        raise SoakError(f"a training with a killed rank ended with status {status}; its log is {log}")
    finish(start(command, log), log)
    check_equal(whole, again)
    print(f"--cpu-processes 2 resumed at iteration {starts_in(log)[-1]}: all that is saved is equal, bit by bit.")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


def main():
    args = parse_args()
    folder = Path(args.work_dir or tempfile.mkdtemp(prefix="mgd_soak_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        soak(args, folder)
    except SoakError as e:
        sys.exit(f"error: {e}")
    if not args.work_dir:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
