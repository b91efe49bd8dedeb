"""One training of a study: what its clock counts, and what it leaves for the runner."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import toy
from accuracy_study import clock as clock_module
from accuracy_study.clock import StepClock
from accuracy_study.results import overrides_list
from accuracy_study.study import read_study
from accuracy_study.tasks import commit_of, teacher_fingerprint
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, TrainerBase

from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import MGD_BACKBONE, class_head

PROJECT = Path(__file__).parents[2] / "projects" / "AccuracyStudy"


def program(name):
    return programs.load(f"projects/AccuracyStudy/{name}.py")


# ------------------------------------------------------------------ clock
class Times:
    """Two clocks that advance only when told to, the CPU's half as fast."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(clock_module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(clock_module.time, "process_time", lambda: self.now / 2)


class Work(HookBase):
    """Work before a step, as of a matching update, and after it, as of an evaluation or a checkpoint."""

    def __init__(self, times):
        self.times = times

    def before_train(self):
        self.times.now += 1000

    def before_step(self):
        self.times.now += 10

    def after_step(self):
        self.times.now += 100


class Steps(TrainerBase):
    def run_step(self):
        self._hooks[1].times.now += 1


def train(times, start, end, state=None):
    clock, trainer = StepClock(), Steps()
    if state is not None:
        clock.load_state_dict(state)
    trainer.register_hooks([clock, Work(times)])
    trainer.train(start, end)
    return clock


def test_the_clock_counts_steps_and_matching_updates_only(monkeypatch):
    clock = train(Times(monkeypatch), 0, 3)
    assert (clock.seconds, clock.cpu_seconds) == (33.0, 16.5)


def test_the_clock_of_a_resumed_training_counts_all_of_it(monkeypatch):
    times = Times(monkeypatch)
    first = train(times, 0, 2)
    state = json.loads(json.dumps(first.state_dict()))
    assert train(times, 2, 5, state).seconds == train(times, 0, 5).seconds == 55.0


# ------------------------------------------------------------------ train.py
@pytest.fixture
def training(tmp_path):
    """Runs train.py in this process; returns result.json."""
    flags = toy.write_scenes(tmp_path / "toy")
    train_program = program("train")

    def run(output, *more, opts=()):
        common = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"]
        argv = ["--config-file", toy.RETINANET, *map(str, flags), *more, *toy.plain_opts(), *common]
        try:
            train_program.main([*argv, "OUTPUT_DIR", str(output), *opts])
        finally:
            for name in ("coco_folder_train", "coco_folder_val"):
                if name in DatasetCatalog:
                    DatasetCatalog.remove(name)
                    MetadataCatalog.remove(name)
        return json.loads((output / "result.json").read_text())

    return run


def schedule(iterations):
    low_threshold = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    return [
        *low_threshold,
        "SOLVER.MAX_ITER",
        str(iterations),
        "TEST.EVAL_PERIOD",
        "2",
        "SOLVER.CHECKPOINT_PERIOD",
        "2",
    ]


@pytest.mark.slow
def test_a_training_leaves_its_scores_cost_and_curve(training, tmp_path):
    result = training(tmp_path / "run", opts=schedule(3))
    assert result["iterations"] == 3
    assert list(result["curve"]) == ["2", "3"]
    assert result["curve"]["3"] == result["scores"]["bbox"]["AP"]
    assert 0 < result["seconds"] < 60 and result["cpu_seconds"] > 0
    assert result["device"] in ("cpu", "cuda") and result["hardware"] and result["torch"]

    # A training that was cut in its last evaluation: it is scored again, and costs what it cost.
    (tmp_path / "run" / "result.json").unlink()
    again = training(tmp_path / "run", "--resume", opts=schedule(3))
    for key in ("scores", "seconds", "cpu_seconds", "curve", "iterations"):
        assert json.dumps(again[key]) == json.dumps(result[key]), key

    weights = ["MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]
    alone = training(tmp_path / "evaluation", "--eval-only", opts=[*schedule(3), *weights])
    assert json.dumps(alone["scores"]) == json.dumps(result["scores"])


@pytest.mark.parametrize("enabled, expected", [("True", 4.0), ("False", 3.0)])
def test_a_training_with_averaged_weights_is_scored_by_them(tmp_path, monkeypatch, enabled, expected):
    train_program = program("train")

    class Trained:
        start_iter, max_iter, clock = 0, 6, StepClock()
        _last_eval_results = {"bbox": {"AP": 3.0}, "ema": {"bbox": {"AP": 4.0}}}

        def __init__(self, cfg):
            pass

        def resume_or_load(self, resume):
            pass

        def train(self):
            lines = [{"iteration": 1, "bbox/AP": 1.0, "ema/bbox/AP": 2.0}]
            (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(train_program, "TimedTrainer", Trained)
    opts = ["SOLVER.MAX_ITER", "6", "SOLVER.EMA.ENABLED", enabled, "OUTPUT_DIR", str(tmp_path)]
    monkeypatch.setattr(train_program, "setup", lambda args: toy.plain_config(opts=opts))
    train_program.run(argparse.Namespace(eval_only=False, resume=False, project=""))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["scores"]["bbox"]["AP"] == expected
    assert result["curve"] == {"2": expected / 2 if enabled == "True" else 1.0, "6": expected}


# ------------------------------------------------------------------ studies
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((PROJECT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_arm_of_a_committed_study_has_a_config(path):
    study = read_study(str(path))
    assert study.name == path.stem
    configs = [read_config(arm.config, overrides_list(arm.overrides)) for arm in study.arms]
    for cfg in configs:
        assert cfg.SOLVER.MAX_ITER == configs[0].SOLVER.MAX_ITER and max(cfg.SOLVER.STEPS) < cfg.SOLVER.MAX_ITER
        assert cfg.DATASETS.TEST == ("fashion_scenes_small_val",)
        assert class_head(cfg).NUM_CLASSES == 10
    # Arms without same_time_as are compared because they differ.
    dumps = [cfg.dump() for arm, cfg in zip(study.arms, configs) if arm.same_time_as is None]
    assert len(set(dumps)) == len(dumps)
    distilled = [cfg for cfg in configs if cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE]
    for teacher in {cfg.MODEL.MGD.TEACHER.CONFIG_FILE for cfg in distilled}:
        assert class_head(read_config(teacher)).NUM_CLASSES == (5 if "clothes" in teacher else 10)


def test_the_readme_counts_the_trainings_of_every_study():
    studies = [read_study(str(path)) for path in sorted((PROJECT / "studies").glob("*.yaml"))]
    counts = {study.name: sum(not arm.eval_only for arm in study.arms) * len(study.seeds) for study in studies}
    rows = re.findall(r"^\| `studies/(\w+)\.yaml` \|.*\| (\d+) \|$", (PROJECT / "README.md").read_text(), re.MULTILINE)
    assert {name: int(count) for name, count in rows} == counts


def test_selecting_arms_keeps_those_that_equal_time_needs():
    run = program("run")
    study = read_study(str(PROJECT / "studies" / "recipe.yaml"))
    chosen = run.selected(study, ["alone_same_time"], [2])
    assert [arm.name for arm in chosen.arms] == ["alone", "distilled", "alone_same_time"] and chosen.seeds == (2,)
    with pytest.raises(run.UserError, match="--arms 'alon'.*Did you mean alone"):
        run.selected(study, ["alon"], None)
    with pytest.raises(run.UserError, match="--seeds 99"):
        run.selected(study, None, [99])


# ------------------------------------------------------------------ provenance
def test_a_commit_is_marked_where_code_differs_from_it(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "projects" / "AccuracyStudy" / "results").mkdir(parents=True)
    code, results = tmp_path / "projects" / "code.py", tmp_path / "projects" / "AccuracyStudy" / "results" / "a.csv"
    assert commit_of(tmp_path) == ""
    code.write_text("a = 1\n")
    results.write_text("a\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")[:12]
    assert commit_of(tmp_path) == head
    results.write_text("a\nb\n")  # as a study does
    assert commit_of(tmp_path) == head
    code.write_text("a = 2\n")
    assert commit_of(tmp_path) == head + "+"


def test_weights_that_are_no_file_keep_their_name(tmp_path):
    assert teacher_fingerprint("torchvision://retinanet_resnet50_fpn") == "torchvision://retinanet_resnet50_fpn"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "train"])
def test_it_starts_without_warnings_of_detectron2(name):
    done = subprocess.run([sys.executable, str(PROJECT / f"{name}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout
    assert "Warning" not in done.stderr
