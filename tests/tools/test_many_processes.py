"""A mistake with several processes: their message once each, and no traceback of the launcher."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "train_net.py"


def test_a_mistake_ends_all_processes_without_a_traceback():
    command = [sys.executable, str(SCRIPT), "--num-gpus", "2", "--dist-url", "auto", "--config-file", "no.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert 1 <= result.stderr.count("error: --config-file 'no.yaml' is neither") <= 2
