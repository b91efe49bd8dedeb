"""The study of EmbedMask, and studies of any project's detectors."""

import importlib.util
import sys
from pathlib import Path

import pytest
from accuracy_study.projects import import_project
from accuracy_study.results import overrides_list
from accuracy_study.study import read_study

from mgd_det.cli.yaml_setup import read_config
from mgd_det.errors import UserError

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "projects" / "EmbedMask" / "studies" / "embedmask.yaml"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def program(name):
    path = ROOT / "projects" / "AccuracyStudy" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"study_{name}_of_projects", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_arm_has_a_config_of_embed_mask():
    study = read_study(str(STUDY))
    import_project(study.project)
    configs = {arm.name: read_config(arm.config, overrides_list(arm.overrides)) for arm in study.arms}
    for cfg in configs.values():
        assert cfg.MODEL.META_ARCHITECTURE == "EmbedMask" and cfg.DATASETS.TEST == ("fashion_scenes_small_val",)
    trained = {name: cfg for name, cfg in configs.items() if not study.arm(name).eval_only}
    assert {(cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) for cfg in trained.values()} == {(160, (112, 144))}
    teachers = {name: cfg.MODEL.MGD.TEACHER.CONFIG_FILE for name, cfg in trained.items()}
    assert teachers == {
        "alone": "",
        "from_retinanet": "demo/retinanet_R_50_FPN.yaml",
        "from_embed_mask": study.arm("teacher").config,
    }
    assert configs["from_embed_mask"].MODEL.MGD.TEACHER.WEIGHTS == configs["teacher"].MODEL.WEIGHTS
    assert configs["teacher"].OUTPUT_DIR in f"./{configs['teacher'].MODEL.WEIGHTS}"


def make_project(folder, name):
    package = folder / name / name.lower()
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return str(folder / name)


def test_runner_and_training_import_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = make_project(tmp_path, "StudiedProject")
    study = tmp_path / "study.yaml"
    arm = "{name: alone, config: demo/retinanet_MobileNetV2_FPN.yaml}"
    study.write_text(f"study: toy\nseeds: [1]\nproject: {folder}\narms:\n  - {arm}\n")
    run, train = program("run"), program("train")
    started = []

    class Runner:
        def __init__(self, *args, program, **kwargs):
            started.extend(program)

        def run(self):
            return []

    monkeypatch.setattr(run, "StudyRunner", Runner)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    run.run(run.parse_args([str(study), "--output-dir", str(tmp_path / "out"), "--results", str(tmp_path / "a.csv")]))
    assert "studiedproject" in sys.modules
    assert started[-2:] == ["--project", folder]

    del sys.modules["studiedproject"]
    monkeypatch.setattr(train, "setup", lambda args: pytest.fail("a UserError comes first"))
    monkeypatch.setattr(train, "run_program", lambda body: body())
    with pytest.raises(UserError, match="nowhere"):
        train.main(["--project", str(tmp_path / "nowhere")])
    with pytest.raises(pytest.fail.Exception):
        train.main(started[2:])
    assert "studiedproject" in sys.modules


def test_a_project_that_is_no_folder_is_one_message(tmp_path):
    (tmp_path / "study.yaml").write_text("study: toy\nseeds: [1]\nproject: 3\narms: [{name: a, config: b}]\n")
    with pytest.raises(UserError, match="study.yaml: project is 3"):
        read_study(str(tmp_path / "study.yaml"))
