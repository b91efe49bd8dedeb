import os

import pytest
import toy

from mgd_det.errors import UserError
from mgd_det.recipe import find_teacher


@pytest.fixture
def folder(tmp_path):
    """A training's folder; the file of its weights is not read."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(toy.teacher_config().dump())
    (tmp_path / "run" / "model_final.pth").write_bytes(b"")
    return tmp_path / "run"


def test_a_name_of_the_model_zoo_has_its_weights():
    found = find_teacher("COCO-Detection/retinanet_R_50_FPN_3x.yaml")
    assert (found.config_file, found.weights) == ("COCO-Detection/retinanet_R_50_FPN_3x.yaml", "")
    assert found.cfg.MODEL.WEIGHTS.endswith("retinanet_R_50_FPN_3x/190397829/model_final_5bd44e.pkl")


def test_a_folder_is_found_from_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_teacher("run")
    monkeypatch.chdir("/")
    assert found.config_file == str(folder / "config.yaml") and found.weights == str(folder / "model_final.pth")
    assert found.cfg.MODEL.WEIGHTS == found.weights and found.cfg.MODEL.FPN.OUT_CHANNELS == 16


def test_a_yaml_with_its_own_or_with_other_weights(folder):
    config = folder / "own.yaml"
    config.write_text(toy.teacher_config(opts=["MODEL.WEIGHTS", str(folder / "model_final.pth")]).dump())
    assert find_teacher(str(config)).weights == str(folder / "model_final.pth")
    other = find_teacher(str(config), "other.pth")
    assert other.weights == other.cfg.MODEL.WEIGHTS == "other.pth"
    assert find_teacher(str(config), opts=["MODEL.FPN.OUT_CHANNELS", 8]).cfg.MODEL.FPN.OUT_CHANNELS == 8


def test_a_yaml_with_relative_weights_is_found_from_anywhere(folder, monkeypatch):
    (folder / "own.yaml").write_text(toy.teacher_config(opts=["MODEL.WEIGHTS", "model_final.pth"]).dump())
    monkeypatch.chdir(folder)
    found = find_teacher("own.yaml")
    assert (found.config_file, found.weights) == (str(folder / "own.yaml"), str(folder / "model_final.pth"))


@pytest.mark.parametrize("missing", ["config.yaml", "model_final.pth"])
def test_an_unfinished_folder(folder, missing):
    os.remove(folder / missing)
    with pytest.raises(UserError, match=f"--teacher .*run has no {missing}"):
        find_teacher(str(folder))


def test_teachers_without_a_config_or_weights(folder):
    with pytest.raises(UserError, match="--teacher 'COCO-Detection/retinanet_R_50_FPN_2x.yaml'.*Did you mean"):
        find_teacher("COCO-Detection/retinanet_R_50_FPN_2x.yaml")
    with pytest.raises(UserError, match="config.yaml names no trained weights.*--teacher-weights"):
        find_teacher(str(folder / "config.yaml"))
