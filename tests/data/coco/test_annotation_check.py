"""Boxes, masks and keypoints of one annotation."""

import json
import math

import numpy as np
import pytest
from coco_data import SIZE, plain_rle, rle

from mgd_det.data.coco import problems as kinds
from mgd_det.data.coco.annotation_check import box_problem, mask_problem

POLYGON = [8, 10, 28, 10, 28, 22]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "box",
    [[1, 2, 3], [1, 2, 3, 4, 5], [], None, 7, "1234", [1, 2, None, 4], [[1], [2], [3], [4]], {"a": 1}, [True] * 4],
)
def test_boxes_that_are_not_four_numbers(box):
    assert box_problem(box, SIZE).kind == kinds.INVALID_BOX and "not four numbers" in box_problem(box, SIZE).message


@pytest.mark.parametrize("box", [[-1e9, 0, 1e9 + 10, 5], [0, 0, 1e300, 5], [-1e300, 0, 2e300, 5]])
def test_boxes_that_float32_would_not_hold(box):
    assert box_problem(box, SIZE).kind == kinds.INVALID_BOX and "farther than" in box_problem(box, SIZE).message


@pytest.mark.parametrize("place, value", [(0, NAN), (1, INF), (2, -INF), (3, NAN), (0, -INF), (2, INF)])
def test_boxes_that_are_not_finite(place, value):
    box = [1.0, 2.0, 3.0, 4.0]
    box[place] = value
    assert box_problem(box, SIZE).kind == kinds.INVALID_BOX and box_problem(box, SIZE).breaks


@pytest.mark.parametrize("box", [[1, 2, -3, 4], [1, 2, 3, -0.1]])
def test_negative_sides(box):
    assert "negative" in box_problem(box, SIZE).message


@pytest.mark.parametrize("x, y, outside", [(63, 0, 0), (64, 0, 1), (0, 47, 0), (0, 48, 1), (-5, 0, 1), (0, -5, 1)])
def test_boxes_outside(x, y, outside):
    problem = box_problem([x, y, 5, 5], SIZE)
    assert (problem.kind, problem.breaks) == ((kinds.BOX_OUTSIDE, True) if outside else (kinds.BOX_STICKS_OUT, False))
    assert box_problem([x, y, 5, 5], None) is None


@pytest.mark.parametrize(
    "polygons, said",
    [
        ([[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]], "no valid polygon"),
        ([[]], "no valid polygon"),
        ([POLYGON, [1, 2, 3, NAN, 5, 6]], "not finite"),
        ([POLYGON, [1, 2, 3, INF, 5, -INF]], "not finite"),
        ([[1, 2, 3, "4", 5, 6]], "not a list of numbers"),
        ([[1, 2, 3, None, 5, 6]], "not a list of numbers"),
        ([[True, 2, 3, 4, 5, 6]], "not a list of numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "not a list of numbers"),
        (POLYGON, "not a list of numbers"),
        ([POLYGON, {}], "not a list of numbers"),
        ([POLYGON, ""], "not a list of numbers"),
        ([[1, 2, 3, 1e6, 5, 6]], "farther than"),
        ([[1, 2, 3, -1e6, 5, 6]], "farther than"),
        ("mask", "neither"),
        (5, "neither"),
    ],
)
def test_polygons(polygons, said):
    problem = mask_problem(polygons, SIZE)
    assert problem.kind == kinds.INVALID_POLYGON and problem.breaks and said in problem.message


def test_rles_of_pycocotools_pass():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.3, 0.9, 1):
        for height, width in ((1, 1), (7, 5), (48, 64), (300, 200)):
            mask = rng.random((height, width)) < density
            for encoded in (rle(mask), plain_rle(mask)):
                assert mask_problem(encoded, (height, width)) is None
                assert mask_problem(encoded, (width + 1, height)) is not None
                json.dumps(encoded)


def test_compressed_counts_are_pycocotools_own():
    """Every cut or changed code is judged as by the runs that pycocotools reads."""
    mask = np.zeros(SIZE)
    mask[3:40, 5:20] = mask[10, 30:50] = 1
    whole = rle(mask)["counts"]
    for counts in [whole[:end] for end in range(1, len(whole))] + [whole + "1", whole.replace("1", "2", 1)]:
        problem = mask_problem({"size": list(SIZE), "counts": counts}, SIZE)
        assert problem and problem.kind == kinds.INVALID_RLE and problem.breaks


@pytest.mark.parametrize(
    "broken",
    [
        {"counts": [3072]},
        {"size": [48, 64]},
        {"size": [48], "counts": [3072]},
        {"size": ["48", "64"], "counts": [3072]},
        {"size": [48, 64], "counts": None},
        {"size": [48, 64], "counts": [3000]},
        {"size": [48, 64], "counts": [4000, -928]},
        {"size": [48, 64], "counts": "\x01"},
        {"size": [48, 64], "counts": "ä"},
        {"size": [48, 64], "counts": ""},
        {"size": [48, 64], "counts": "z" * 5},
        {"size": [48, 64], "counts": [1.5, 3070.5]},
        {"size": [48, 64], "counts": "o" * 1_000_000},  # one number of five million bits, if it were read
    ],
)
def test_rles_that_cannot_be_decoded(broken):
    for size in (SIZE, None):
        assert mask_problem(broken, size).kind == kinds.INVALID_RLE
