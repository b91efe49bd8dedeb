"""student.yaml and model_final.pth, wherever they lie."""

import shutil

import pytest
import toy
from detectron2.config import get_cfg

from mgd_det.cli import lazy_setup
from mgd_det.cli.yaml_setup import read_config, save_student_config
from mgd_det.files.student_files import student_weights, weights_beside
from mgd_det.files.unsafe_files import ALLOW_UNSAFE_FILES


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder as a training leaves it that was given a relative OUTPUT_DIR; the weights are not read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_final.pth").write_bytes(b"")
    cfg = toy.distilled_config("nowhere.pth", opts=["OUTPUT_DIR", "run"])
    assert save_student_config(cfg) == "run/student.yaml"
    return tmp_path / "run"


def test_from_another_current_folder(trained, monkeypatch):
    monkeypatch.chdir("/")
    expected = str(trained / "model_final.pth")
    assert read_config(str(trained / "student.yaml")).MODEL.WEIGHTS == expected
    plain = get_cfg()  # what a plain Detectron2 user does
    plain.merge_from_file(str(trained / "student.yaml"))
    assert plain.MODEL.WEIGHTS == expected


def test_after_a_move(trained, tmp_path, monkeypatch):
    shutil.move(trained, tmp_path / "moved" / "here")
    moved = tmp_path / "moved" / "here"
    assert read_config(str(moved / "student.yaml")).MODEL.WEIGHTS == str(moved / "model_final.pth")
    monkeypatch.chdir(moved)
    assert read_config("student.yaml").MODEL.WEIGHTS == str(moved / "model_final.pth")


def test_a_copy_has_its_own_weights_though_the_first_are_still_there(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    assert read_config(str(tmp_path / "copy" / "student.yaml")).MODEL.WEIGHTS == str(
        tmp_path / "copy" / "model_final.pth"
    )


def test_an_override_and_other_configs_keep_what_they_say(trained):
    config = str(trained / "student.yaml")
    assert read_config(config, ["MODEL.WEIGHTS", "other.pth"]).MODEL.WEIGHTS == "other.pth"
    other = trained / "other.yaml"
    other.write_text('MODEL: {WEIGHTS: "/elsewhere/model_final.pth"}')
    assert read_config(str(other)).MODEL.WEIGHTS == "/elsewhere/model_final.pth"
    assert weights_beside(config, "detectron2://ImageNetPretrained/MSRA/R-50.pkl").startswith("detectron2://")
    (trained / "model_final.pth").unlink()
    assert weights_beside(config, "/elsewhere/model_final.pth") == "/elsewhere/model_final.pth"


def test_a_lazy_config_has_the_weights_beside_it_too(tmp_path, monkeypatch):
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    parts = "dataloader: {}\noptimizer: {}\nlr_multiplier: {}\nmodel: {}\n"
    config = tmp_path / "student.yaml"
    config.write_text(f"{parts}train: {{init_checkpoint: /elsewhere/model_final.pth}}\n")
    assert lazy_setup.read_config(str(config), []).train.init_checkpoint == "/elsewhere/model_final.pth"
    (tmp_path / "model_final.pth").write_bytes(b"")
    assert lazy_setup.read_config(str(config), []).train.init_checkpoint == str(tmp_path / "model_final.pth")
    other = lazy_setup.read_config(str(config), ["train.init_checkpoint=other.pth"])
    assert other.train.init_checkpoint == "other.pth"


def test_a_remote_folder_stays_as_it_is():
    assert student_weights("s3://bucket/run") == "s3://bucket/run/model_final.pth"
