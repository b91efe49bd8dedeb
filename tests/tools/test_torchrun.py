"""Two processes of tools/train_net.py, by torchrun and by its own flag."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy

SCRIPT = Path(__file__).parents[2] / "tools" / "train_net.py"


@pytest.mark.slow
def test_two_processes_under_torchrun_train_one_student(tmp_path):
    flags = toy.write_scenes(tmp_path / "toy", train=8, val=3)
    opts = [*toy.plain_opts(), *toy.distilled_opts(toy.save_teacher(tmp_path / "teacher.pth"))]
    opts += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", 0]
    opts += ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command = [*torchrun, SCRIPT, "--config-file", toy.RETINANET, *flags, *opts, "OUTPUT_DIR", tmp_path / "out"]
    result = subprocess.run(
        [str(x) for x in command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        timeout=240,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    assert "Rank of current process: 0. World size: 2" in output
    assert "Matching update at iteration 2 took" in output and "Evaluation results for bbox" in output
    assert "Rank of current process: 1. World size: 2" in (tmp_path / "out" / "log.txt.rank1").read_text()
    assert torch.load(tmp_path / "out" / "model_final.pth")["iteration"] == 2


@pytest.mark.slow
def test_a_signal_to_the_program_saves_the_training_of_two_processes(tmp_path):
    flags = toy.write_scenes(tmp_path / "toy", train=8, val=1)[:4]
    opts = [*toy.plain_opts(), "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 5000, "SOLVER.STEPS", "()", "SEED", 3]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 1000, "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", "()"]
    # --resume without a checkpoint begins with the first iteration.
    command = [sys.executable, SCRIPT, "--cpu-processes", 2, "--resume", "--config-file", toy.RETINANET, *flags, *opts]
    command += ["OUTPUT_DIR", tmp_path / "out"]
    with open(tmp_path / "output.txt", "wb") as file:
        program = subprocess.Popen(
            [str(x) for x in command],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    metrics, deadline = tmp_path / "out" / "metrics.json", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text()):  # written from iteration 19 on
        assert program.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.05)
    program.terminate()
    status, said = program.wait(120), (tmp_path / "output.txt").read_text()
    assert status == 75 and "Traceback" not in said and "error:" not in said and "Warning:" not in said, said
    assert "Starting training from iteration 0" in said
    (name,) = re.findall(r"saved as .*/(model_\d{7}).pth", said)  # said once
    assert torch.load(tmp_path / "out" / f"{name}.pth")["iteration"] == int(name[-7:]) >= 19
