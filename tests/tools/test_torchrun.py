"""torchrun starts tools/train_net.py as a user has it."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import toy

SCRIPT = Path(__file__).parents[2] / "tools" / "train_net.py"


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
