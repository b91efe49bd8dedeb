"""tools/benchmark.py as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from mgd_det.cli.benchmark import main

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_config_without_a_matching_is_measured_without_its_parts(tmp_path):
    output = tmp_path / "benchmark.json"
    opts = [*toy.plain_opts(), *toy.distilled_opts("no weights are read"), "MODEL.MGD.POSITIONS", "['p3', 'p4']"]
    opts += ["MODEL.MGD.LOSS.NAMES", "['pkd']"]
    argv = ["--config-file", toy.RETINANET, "--size", "64x64", "--batch", 2, "--steps", 2, "--output", output]
    result = run(*argv, *opts)
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    assert figures["ratios"]["distilled step / (plain step + teacher's bottom-up)"]["median"] > 0
    assert figures["ratios"]["naive part / distillation part"] is None
    assert not {"distillation_part_s", "assignment_s", "naive_part_peak_bytes"} & set(figures)


@pytest.mark.parametrize(
    "argv, status, texts",
    [
        (["--config-file", toy.RETINANET], 1, ["--config-file", toy.RETINANET, "MODEL.BACKBONE.NAME"]),
        (["--config-file", toy.RETINANET, "--size", "800"], 2, ["'800'"]),
        (
            ["--config-file", toy.RETINANET, *toy.distilled_opts("none"), "MODEL.MGD.LOSS.MASK.NAME", "scores"],
            1,
            ["MODEL.MGD.LOSS.MASK.NAME is 'scores'"],
        ),
        # Found before the config is read.
        (
            ["--config-file", "nowhere.yaml", "--output", "/no/such/folder/a.json"],
            1,
            ["--output /no/such/folder/a.json"],
        ),
    ],
)
def test_mistakes(argv, status, texts, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    output = capsys.readouterr().err
    assert exit_.value.code == status and all(text in output for text in texts) and "Traceback" not in output


def test_an_output_that_can_be_written_is_left_as_it_was(tmp_path):
    old = tmp_path / "old.json"
    old.write_text("{}")
    for path in (old, tmp_path / "new.json"):
        with pytest.raises(SystemExit):
            main(["--config-file", "nowhere.yaml", "--output", str(path)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "{}")]
