"""A trained detector by the folder of its training, or by a config."""

import json

import coco_data
import pytest
import toy

from mgd_det.engine.trained_detector import read_trained_detector
from mgd_det.errors import UserError


def written(folder, *opts):
    path = folder / "config.yaml"
    path.write_text(toy.plain_config(opts=list(map(str, opts))).dump())
    return path


def categories(folder, number, *opts):
    weights = ["MODEL.WEIGHTS", folder / "w.pth", "MODEL.RETINANET.NUM_CLASSES", number]
    return read_trained_detector(str(written(folder, *weights, *opts)))[1]


@pytest.mark.slow
def test_the_last_checkpoint_where_a_training_has_not_ended(tmp_path):
    written(tmp_path)
    with pytest.raises(UserError, match="model_final.pth"):
        read_trained_detector(str(tmp_path))
    assert read_trained_detector(str(tmp_path), ["MODEL.WEIGHTS", "f.pth"])[0].MODEL.WEIGHTS == "f.pth"
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    (tmp_path / "model_0000009.pth").touch()
    assert read_trained_detector(str(tmp_path))[0].MODEL.WEIGHTS == str(tmp_path / "model_0000009.pth")
    (tmp_path / "model_final.pth").touch()
    cfg = read_trained_detector(str(tmp_path), ["TEST.DETECTIONS_PER_IMAGE", "7"]).cfg
    assert (cfg.MODEL.WEIGHTS, cfg.TEST.DETECTIONS_PER_IMAGE) == (str(tmp_path / "model_final.pth"), 7)


def test_categories_of_a_registered_set_have_its_ids(tmp_path):
    found = categories(tmp_path, 80, "DATASETS.TRAIN", "('coco_2017_train',)")
    assert found[11] == {"id": 13, "name": "stop sign"} and len(found) == 80


def test_categories_of_the_file_beside_the_weights_come_first(tmp_path):
    own = [{"id": 7, "name": "plane"}, {"id": 3, "name": "boat"}]
    (tmp_path / "categories.json").write_text(json.dumps(own))
    assert categories(tmp_path, 2) == own


def test_categories_of_the_json_of_the_training(tmp_path):
    coco_data.write(tmp_path, coco_data.content())
    key, path = "DATASETS.COCO_FOLDER.TRAIN_JSON", tmp_path / "instances.json"
    found = categories(tmp_path, len(coco_data.CATEGORIES), key, path)
    assert {entry["id"]: entry["name"] for entry in found} == coco_data.CATEGORIES


@pytest.mark.parametrize("json_text", [None, "[]"], ids=["unknown", "a json that is not COCO's"])
def test_classes_that_nothing_tells_are_numbered(json_text, tmp_path, caplog):
    opts = []
    if json_text:
        (tmp_path / "a.json").write_text(json_text)
        opts = ["DATASETS.COCO_FOLDER.TRAIN_JSON", tmp_path / "a.json"]
    found = categories(tmp_path, 2, "DATASETS.TRAIN", "('no_such_set',)", "DATASETS.TEST", "()", *opts)
    assert found == [{"id": 1, "name": "class 1"}, {"id": 2, "name": "class 2"}]
    assert "2 classes" in caplog.text
