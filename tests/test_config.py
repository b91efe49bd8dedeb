"""Values that Detectron2 would merge without a word."""

import pytest

from mgd_det.config import merge_config
from mgd_det.errors import UserError


@pytest.mark.parametrize(
    "key, value",
    [
        ("POSITIONS", None),
        ("POSITIONS", [1]),
        ("POSITIONS", [["res2"]]),
        ("NORM", None),
        ("NORM_GROUPS", None),
        ("LOSS", None),
        ("LOSS.NAMES", [["l2"]]),
        ("LOSS.L2.WEIGHTS", None),
        ("LOSS.L2.WEIGHTS", [None]),
        ("LOSS.L2.WEIGHTS", [True]),
        ("TEACHER.ALLOW_UNSET", [3]),
        ("MATCHING.PERIODS", [1.5]),
        ("MATCHING.MILESTONES", "None"),
    ],
)
def test_values_of_another_type_are_named_with_their_key(key, value):
    with pytest.raises(UserError, match=f"MODEL.MGD.{key}"):
        merge_config("", [f"MODEL.MGD.{key}", value])


def test_values_of_the_same_type():
    changes = {"LOSS.L2.WEIGHTS": [1, 0.5], "TEACHER.OPTS": ["SEED", 1], "MATCHING.MILESTONES": []}
    changes["POSITIONS"] = ("p3",)
    cfg = merge_config("", [part for key, value in changes.items() for part in (f"MODEL.MGD.{key}", value)])
    assert cfg.MODEL.MGD.LOSS.L2.WEIGHTS == [1, 0.5] and cfg.MODEL.MGD.POSITIONS == ["p3"]
    assert cfg.MODEL.MGD.TEACHER.OPTS == ["SEED", 1] and cfg.MODEL.MGD.MATCHING.MILESTONES == []


def test_overrides_without_a_key():
    with pytest.raises(UserError, match="KEY, VALUE"):
        merge_config("", [None, None])
