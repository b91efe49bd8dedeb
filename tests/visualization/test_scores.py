"""Scores of several models in one table."""

import json
import math

import numpy as np
import pytest

from mgd_det.errors import UserError
from mgd_det.visualization.scores import last_scores, main_score, read_scores, score_tables, write_scores


def test_tables_have_a_column_for_each_model_and_classes_apart():
    teacher = {"bbox/AP": 40.0, "bbox/APs": math.nan, "bbox/AP-T-shirt/top": 30.0, "segm/AP": 35.0}
    student = {"bbox/AP50": 50.0, "bbox/AP": 20.0, "bbox/AP-Coat": 10.0, "bbox_TTA/AP": 21.0, "lr": 3.0}
    boxes, masks, augmented = score_tables([teacher, student])
    assert (boxes.title, masks.title) == ("boxes", "masks") and augmented.title.startswith("boxes with")
    assert boxes.rows == [("AP", [40.0, 20.0]), ("AP50", [None, 50.0]), ("APs", [None, None])]
    assert boxes.classes == [("Coat", [None, 10.0]), ("T-shirt/top", [30.0, None])]
    assert masks.rows == [("AP", [35.0, None])] and augmented.rows == [("AP", [None, 21.0])]


def test_several_sets_have_tables_of_their_own():
    tables = score_tables([{"day/bbox/AP": 1.0, "night/bbox/AP": 2.0, "night/bbox/AP-a/b": 3.0}])
    assert [table.title for table in tables] == ["day, boxes", "night, boxes"]
    assert tables[1].rows == [("AP", [2.0])] and tables[1].classes == [("a/b", [3.0])]


@pytest.mark.parametrize(
    "names, main",
    [
        (["segm/AP", "bbox/AP", "bbox/AP50"], "bbox/AP"),
        (["bbox_TTA/AP", "bbox/AP"], "bbox/AP"),
        (["a/segm/AP"], "a/segm/AP"),
        (["sem_seg/mIoU"], ""),
    ],
)
def test_the_score_that_stands_for_a_model(names, main):
    assert main_score(dict.fromkeys(names, 1.0)) == main


def test_the_last_evaluation_counts():
    metrics = {"bbox/AP": (np.array([9, 19]), np.array([1.0, 2.0])), "total_loss": (np.array([19]), np.array([7.0]))}
    assert last_scores(metrics) == {"bbox/AP": 2.0}


def test_written_scores_are_read_again(tmp_path):
    path = tmp_path / "scores.json"
    write_scores({"set": {"bbox": {"AP": 1.5, "AP-a/b": math.nan}}}, path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"set/bbox/AP": 1.5, "set/bbox/AP-a/b": None}
    scores = read_scores(path)
    assert scores.keys() == {"set/bbox/AP", "set/bbox/AP-a/b"} and scores["set/bbox/AP"] == 1.5
    assert math.isnan(scores["set/bbox/AP-a/b"])


@pytest.mark.parametrize("content", ["{", "[1]", json.dumps({"lr": 1.0})])
def test_a_file_without_scores(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match="other.json"):
        read_scores(path)
    with pytest.raises(UserError, match="nothing.json"):
        read_scores(tmp_path / "nothing.json")


def test_averaged_weights_have_tables_of_their_own():
    scores = {"ema/bbox/AP": 3.0, "bbox/AP": 2.0, "ema/my_val/segm/AP": 5.0, "my_val/segm/AP": 4.0}
    tables = {table.title: [row.values for row in table.rows] for table in score_tables([scores])}
    assert tables == {
        "boxes of the averaged weights": [[3.0]],
        "boxes": [[2.0]],
        "my_val, masks of the averaged weights": [[5.0]],
        "my_val, masks": [[4.0]],
    }
    assert main_score({"ema/bbox/AP": 3.0, "bbox/AP": 2.0}) == "bbox/AP"
