"""Values that Detectron2 would merge without a check, and old keys."""

import pytest
from detectron2.config import CfgNode

from mgd_det import config
from mgd_det.config import class_head, detector_kind, merge_config, plain_student_config, register_detector
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
        ("LOSS.MASK", None),
        ("LOSS.MASK.NAME", None),
        ("LOSS.MASK.FOREGROUND", None),
        ("LOSS.AB.MARGIN", None),
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


def test_keys_of_version_0_1_that_are_gone_still_load(tmp_path, caplog):
    old = tmp_path / "config.yaml"
    old.write_text("MODEL: {MGD: {COMPILE_STUDENT: true, NORM: BN, TEACHER: {OWN_STREAM: true, COMPILE: true}}}")
    cfg = merge_config(str(old), ["MODEL.MGD.TEACHER.OWN_STREAM", "False", "MODEL.MGD.COMPILE_STUDENT", "False"])
    assert cfg.MODEL.MGD.NORM == "BN" and cfg.MODEL.MGD.TEACHER.COMPILE
    assert "COMPILE_STUDENT" not in cfg.MODEL.MGD and "OWN_STREAM" not in cfg.MODEL.MGD.TEACHER
    for key in ("MODEL.MGD.COMPILE_STUDENT", "MODEL.MGD.TEACHER.OWN_STREAM"):
        assert key in caplog.text
    with pytest.raises(UserError, match="MODEL.MGD.NO_SUCH"):
        merge_config(str(old), ["MODEL.MGD.NO_SUCH", 1])


def test_overrides_without_a_key():
    with pytest.raises(UserError, match="KEY, VALUE"):
        merge_config("", [None, None])


def test_a_projects_detector_has_its_keys_in_every_config(monkeypatch):
    monkeypatch.setattr(config, "_extensions", {})

    def add_keys(cfg):
        cfg.MODEL.TOY = CfgNode({"SIZE": 3})

    before = merge_config("", [])
    register_detector("ToyDetector", kind="RetinaNet", node="TOY", add_keys=add_keys)
    cfg = merge_config("", ["MODEL.META_ARCHITECTURE", "ToyDetector", "MODEL.TOY.SIZE", "5"])
    assert cfg.MODEL.TOY.SIZE == 5
    assert detector_kind(cfg) == "RetinaNet" and class_head(cfg) is cfg.MODEL.RETINANET
    assert plain_student_config(cfg).MODEL.TOY.SIZE == 5
    # A student of another kind stays one that Detectron2 reads.
    for other in (merge_config("", []), before):
        assert "TOY" not in plain_student_config(other).MODEL
