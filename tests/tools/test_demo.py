"""What the demo reads from its runs; the runs themselves are `make demo`."""

import argparse
import threading
import time

import programs
import pytest
from safetensors.torch import save_file
from torch import zeros

from mgd_det.errors import UserError


@pytest.fixture(scope="module")
def demo():
    return programs.load("tools/demo.py")


def finished(demo, folder, config, seconds_per_step, updates=(), ap=(1.0, 2.5)):
    """A run as tools/train_net.py leaves it behind."""
    folder.mkdir()
    log = [f"[x mgd_det]: Matching update at iteration {i} took {s} s, 80 images:" for i, s in updates]
    log.append(f"[x d2]: Overall training speed: 98 iterations in 0:00:29 ({seconds_per_step} s / it)")
    for value in ap:
        log += ["[x d2]: copypaste: Task: bbox", "[x d2]: copypaste: AP,AP50,AP75,APs,APm,APl"]
        log.append(f"[x d2]: copypaste: {value},{2 * value},0.5000,1.0000,3.0000,nan")
    (folder / "stdout.txt").write_text("\n".join(log))
    return demo.Run("name", "title", config, folder, ["SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(60,90)"])


def test_training_time_counts_steps_and_matching_updates(demo, tmp_path):
    run = finished(demo, tmp_path / "run", demo.STUDENT, 0.5, updates=[(0, 4.0), (50, 6.0)])
    assert run.training_seconds() == pytest.approx(100 * 0.5 + 10)
    results = run.results()  # of the last evaluation
    assert (results["AP"], results["AP50"], results["AP75"]) == (2.5, 5.0, 0.5)


def test_the_same_time_stretches_the_whole_schedule(demo, tmp_path):
    plain = finished(demo, tmp_path / "plain", demo.STUDENT, 0.25)
    distilled = finished(demo, tmp_path / "distilled", demo.STUDENT, 0.5, updates=[(0, 5.0)])
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


STAND_IN = """
import os, sys, time
folder = sys.argv[-1]
open(folder + "/started", "w").write(os.environ["OMP_NUM_THREADS"] + " " + " ".join(sys.argv[1:]))
deadline = time.monotonic() + 30
while not os.path.exists(folder + "/../go"):
    assert time.monotonic() < deadline
    time.sleep(0.02)
if os.path.exists(folder + "/fail"):
    sys.exit("out of luck")
print("copypaste: AP,AP50,AP75\\ncopypaste: 7.5,9,nan")
"""


@pytest.fixture
def stand_in(demo, tmp_path, monkeypatch):
    """tools/train_net.py is a program that waits for the file "go"."""
    (tmp_path / "train_net.py").write_text(STAND_IN)
    monkeypatch.setattr(demo, "TOOLS", tmp_path)
    return tmp_path


def test_runs_are_side_by_side_with_one_thread_each(demo, stand_in, monkeypatch):
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 2)
    runs = [demo.Run(name, name, demo.STUDENT, stand_in / name, ["KEY", "1"]) for name in ("a", "b")]

    def let_go():
        deadline = time.monotonic() + 30
        while not all((run.output_dir / "started").exists() for run in runs) and time.monotonic() < deadline:
            time.sleep(0.02)
        (stand_in / "go").write_text(str(all((run.output_dir / "started").exists() for run in runs)))

    waiting = threading.Thread(target=let_go)
    waiting.start()
    demo.run_side_by_side("2/4", runs)
    waiting.join()
    assert (stand_in / "go").read_text() == "True"  # both had started before either ended
    assert [run.results()["AP"] for run in runs] == [7.5, 7.5]
    started = (stand_in / "a" / "started").read_text()
    assert started == f"1 --config-file {demo.STUDENT} KEY 1 OUTPUT_DIR {stand_in / 'a'}"


def test_a_run_that_fails_shows_the_end_of_its_log(demo, stand_in):
    run = demo.Run("a", "a", demo.STUDENT, stand_in / "a", [])
    run.output_dir.mkdir()
    (run.output_dir / "fail").write_text("")
    (stand_in / "go").write_text("")
    with pytest.raises(UserError, match="a failed.*\n.*out of luck"):
        demo.run_side_by_side("2/4", [run])


def test_a_trained_teacher_is_evaluated_and_says_how_long_it_was_trained(demo, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    save_file({"a": zeros(1)}, weights, {"iterations": "3600"})
    teacher = demo.TrainedTeacher(weights, tmp_path / "teacher", ["KEY", "1"])
    assert teacher.command()[2:] == (
        ["--config-file", demo.TEACHER, "--eval-only", "KEY", "1"]
        + ["OUTPUT_DIR", str(tmp_path / "teacher"), "MODEL.WEIGHTS", str(weights)]
    )
    assert (teacher.iterations(), teacher.shown_seconds()) == ("3600", "-")


def test_the_teachers_file_is_half_as_large_and_says_what_it_is(demo, tmp_path):
    import torch
    from safetensors import safe_open

    checkpoint, weights = tmp_path / "model_final.pth", tmp_path / "teacher.safetensors"
    torch.save({"model": {"a.weight": torch.full((1000,), 0.1)}, "iteration": 7}, checkpoint)
    demo.write_teacher(checkpoint, weights, 21.234, 3600)
    with safe_open(weights, "pt") as file:
        assert list(file.keys()) == ["a.weight"] and file.get_tensor("a.weight").dtype == torch.float16
        metadata = file.metadata()
    assert {key: metadata[key] for key in ("AP", "iterations", "config")} == {
        "AP": "21.23",
        "iterations": "3600",
        "config": "configs/demo/retinanet_R_50_FPN.yaml",
    }
    assert 2000 < weights.stat().st_size < 3000


def test_a_teacher_that_does_not_exist_ends_it_at_once(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_tool", lambda *_: pytest.fail("it started to work"))
    args = argparse.Namespace(
        output_dir=str(tmp_path), opts=[], teacher=str(tmp_path / "none.safetensors"), train_teacher=False
    )
    with pytest.raises(UserError, match=f"--teacher {tmp_path}/none.safetensors .*--train-teacher"):
        demo.demo(args)


def test_no_matching_is_drawn_where_the_recipe_has_none(demo, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(demo, "run_tool", lambda *argv: drawn.append(argv))
    demo.draw_matching(finished(demo, tmp_path / "identity", demo.DISTILLED, 0.5), tmp_path)
    assert drawn == []
    demo.draw_matching(finished(demo, tmp_path / "assignment", demo.DISTILLED, 0.5, updates=[(0, 1.0)]), tmp_path)
    assert drawn[0][:3] == ("visualize_matching.py", "--config-file", demo.DISTILLED)


def test_an_output_folder_that_cannot_be_written_ends_it_at_once(demo, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: pytest.fail("it started to work"))
    with pytest.raises(UserError, match=f"--output-dir {tmp_path}/file/demo "):
        demo.demo(argparse.Namespace(output_dir=str(tmp_path / "file" / "demo"), opts=[]))


@pytest.mark.slow
def test_a_tool_that_fails_ends_the_demo_with_its_status(demo, capfd):
    with pytest.raises(SystemExit) as error:
        demo.run_tool("prepare_fashion_scenes.py", "no_such_size")
    assert error.value.code == 2
    assert "no_such_size" in capfd.readouterr().err
