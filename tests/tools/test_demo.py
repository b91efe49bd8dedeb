"""What the demo reads from its runs; the runs themselves are `make demo`."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

from mgd_det.errors import UserError

SCRIPT = Path(__file__).parents[2] / "tools" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_program", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finished(demo, folder, config, seconds_per_step, updates=(), ap=(1.0, 2.5)):
    """A run as tools/train_net.py leaves it behind."""
    folder.mkdir()
    log = [f"[x mgd_det]: Matching update at iteration {i} took {s} s, 80 images:" for i, s in updates]
    log.append(f"[x d2]: Overall training speed: 98 iterations in 0:00:29 ({seconds_per_step} s / it)")
    (folder / "stdout.txt").write_text("\n".join(log))
    rows = [{"iteration": i, "bbox/AP": value} for i, value in enumerate(ap)]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return demo.Run("name", "title", config, folder, ["SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(60,90)"])


def test_training_time_counts_steps_and_matching_updates(demo, tmp_path):
    run = finished(demo, tmp_path / "run", demo.DISTILLED, 0.5, updates=[(0, 4.0), (50, 6.0)])
    assert run.training_seconds() == pytest.approx(100 * 0.5 + 10)
    assert run.results()["bbox/AP"] == 2.5  # the last evaluation


def test_the_same_time_stretches_the_whole_schedule(demo, tmp_path):
    plain = finished(demo, tmp_path / "plain", demo.STUDENT, 0.25)
    distilled = finished(demo, tmp_path / "distilled", demo.DISTILLED, 0.5, updates=[(0, 5.0)])
    plain.opts += ["TEST.EVAL_PERIOD", "40"]
    overrides = demo.longer_schedule(plain, distilled)
    assert overrides == ["SOLVER.MAX_ITER", "220", "SOLVER.STEPS", "(132, 198)", "TEST.EVAL_PERIOD", "88"]
    assert plain.cfg().MODEL.WEIGHTS == str(tmp_path / "plain" / "model_final.pth")


def test_student_runs_differ_in_distillation_only(demo):
    """Same initialisation, data and schedule: all keys but those of distillation and the output folder are equal."""
    from mgd_det.cli.yaml_setup import read_config
    from mgd_det.config import without_distillation

    plain, distilled = (without_distillation(read_config(config)) for config in (demo.STUDENT, demo.DISTILLED))
    for cfg in (plain, distilled):
        cfg.MODEL.pop("MGD")
        cfg.OUTPUT_DIR = ""
    assert plain == distilled
    assert plain.SEED >= 0


def test_an_output_folder_that_cannot_be_written_ends_it_at_once(demo, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: pytest.fail("it started to work"))
    with pytest.raises(UserError, match=f"--output-dir {tmp_path}/file/demo "):
        demo.demo(argparse.Namespace(output_dir=str(tmp_path / "file" / "demo"), opts=[]))


def test_a_tool_that_fails_ends_the_demo_with_its_status(demo, capfd):
    with pytest.raises(SystemExit) as error:
        demo.run_tool("prepare_fashion_scenes.py", "no_such_size")
    assert error.value.code == 2
    assert "no_such_size" in capfd.readouterr().err
