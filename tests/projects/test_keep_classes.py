"""The program that writes a json with some of another's classes."""

import json

import programs
import pytest
from pycocotools.coco import COCO

from mgd_det.errors import UserError

CONTENT = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 8} for i in (1, 2, 3)],
    "categories": [{"id": 4, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "a cow"}],
    "annotations": [
        {"id": number, "image_id": image, "category_id": category, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}
        for number, (image, category) in enumerate([(1, 4), (1, 7), (2, 7), (2, 9), (2, 9)], start=1)
    ],
}


@pytest.fixture(scope="module")
def keep_classes():
    return programs.load("projects/AccuracyStudy/keep_classes.py")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(CONTENT))
    return path


def test_it_keeps_the_classes_with_their_objects_and_every_image(keep_classes, source, tmp_path, capsys):
    output = tmp_path / "some.json"
    keep_classes.run(keep_classes.parse_args([str(source), str(output), "a cow", "cat"]))
    everything, kept = COCO(str(source)), COCO(str(output))
    assert kept.getImgIds() == everything.getImgIds()
    assert [category["name"] for category in kept.dataset["categories"]] == ["cat", "a cow"]
    assert kept.getAnnIds() == everything.getAnnIds(catIds=everything.getCatIds(catNms=["cat", "a cow"])) == [1, 4, 5]
    assert "2 of 3 classes, 3 of 5 objects" in capsys.readouterr().out
    assert json.loads(source.read_text()) == CONTENT


@pytest.mark.parametrize(
    "content, classes, message",
    [
        (json.dumps(CONTENT), ["cat", "dogg"], "no class 'dogg'.*Did you mean dog"),
        ("{", ["cat"], "is not a json"),
        ("[]", ["cat"], "is not a json"),
        ('{"images": []}', ["cat"], "is not a json"),
        ('{"categories": [{"id": 1, "name": "cat"}], "annotations": [{"id": 1}]}', ["cat"], "category_id"),
    ],
)
def test_a_wrong_input_is_named_and_nothing_is_written(keep_classes, source, tmp_path, content, classes, message):
    source.write_text(content)
    output = tmp_path / "some.json"
    with pytest.raises(UserError, match=message):
        keep_classes.run(keep_classes.parse_args([str(source), str(output), *classes]))
    assert not output.exists()


def test_a_missing_file_is_not_called_a_broken_one(keep_classes, tmp_path):
    with pytest.raises(UserError, match="nothing.json cannot be read: No such file"):
        keep_classes.run(keep_classes.parse_args([str(tmp_path / "nothing.json"), str(tmp_path / "out.json"), "cat"]))


def test_a_file_that_is_there_is_not_replaced(keep_classes, source, tmp_path):
    output = tmp_path / "some.json"
    output.write_text("mine")
    with pytest.raises(UserError, match="some.json is there already"):
        keep_classes.run(keep_classes.parse_args([str(source), str(output), "cat"]))
    assert output.read_text() == "mine"
