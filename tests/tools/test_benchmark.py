"""tools/benchmark.py as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark.py"


def run(*argv):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, argv)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
        check=False,
    )


def test_a_table_and_a_json_of_all_figures(tmp_path):
    output = tmp_path / "benchmark.json"
    opts = [*toy.plain_opts(), *toy.distilled_opts("no weights are read")]
    argv = ["--config-file", toy.RETINANET, "--size", "64x64", "--batch", 2, "--steps", 2, "--output", output]
    result = run(*argv, *opts)
    assert result.returncode == 0, result.stderr
    assert "naive part / distillation part" in result.stdout
    figures = json.loads(output.read_text())
    times = ["plain_step", "distilled_step", "online_step", "observation", "teacher_bottom_up", "student_bottom_up"]
    times += ["measuring_pass", "assignment", "distillation_part", "naive_part"]
    times += ["distillation_part_res4", "naive_part_res5"]
    assert all(figures[f"{name}_s"] > 0 for name in times)
    assert {"distillation_part_peak_bytes", "naive_part_peak_bytes"} <= set(figures)
    rounds = [figures["rounds_s"][name] for name in ("distilled_step", "plain_step", "teacher_bottom_up")]
    first, second = (distilled / (plain + teacher) for distilled, plain, teacher in zip(*rounds))
    ratio = figures["ratios"]["distilled step / (plain step + teacher's bottom-up)"]["median"]
    assert ratio == pytest.approx((first + second) / 2)
    assert figures["distilled_step_s"] == pytest.approx(sum(rounds[0]) / 2)
    assert figures["about"]["size"] == [64, 64] and figures["about"]["torch"]


def test_mistakes():
    result = run("--config-file", toy.RETINANET)
    assert result.returncode == 1 and "has no distillation" in result.stderr and "Traceback" not in result.stderr
    # Found before anything is measured, or the config is read.
    result = run("--config-file", "nowhere.yaml", "--output", "/no/such/folder/figures.json")
    assert result.returncode == 1 and "--output /no/such/folder/figures.json" in result.stderr
    assert "Traceback" not in result.stderr and "nowhere" not in result.stderr
    result = run("--config-file", toy.RETINANET, "--size", "800")
    assert result.returncode == 2 and "'800'" in result.stderr
