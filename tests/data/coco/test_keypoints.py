"""Names of keypoints, and which change places in a mirrored image."""

import coco_data
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices

from mgd_det.data.coco.keypoints import (
    Keypoints,
    check_number_of_keypoints,
    check_same_keypoints,
    check_sigmas,
    keypoints_of,
    left_right_pairs,
    register_keypoints,
)
from mgd_det.errors import UserError

NAME = "test_keypoints"
COCO = MetadataCatalog.get("keypoints_coco_2017_train")


@pytest.fixture(autouse=True)
def catalog():
    yield
    coco_data.forget(NAME)


@pytest.mark.parametrize(
    "names, pairs",
    [
        (COCO.keypoint_names, list(COCO.keypoint_flip_map)),
        (["left", "middle", "right"], [("left", "right")]),
        (["LeftEye", "Tail", "RightEye"], [("LeftEye", "RightEye")]),
        (["EYE_LEFT", "EYE_RIGHT"], [("EYE_LEFT", "EYE_RIGHT")]),
        (["r_hip", "l_hip", "ear.L", "ear.R"], [("r_hip", "l_hip"), ("ear.L", "ear.R")]),
        (["bright_spot", "left_eye", "leg", "reg", "tail"], []),
        ([], []),
    ],
)
def test_left_and_right(names, pairs):
    assert left_right_pairs(names) == pairs


def test_a_set_of_ones_own_trains_beside_cocos():
    """Detectron2 compares names and pairs of all sets to train on."""
    DatasetCatalog.register(NAME, list)
    register_keypoints(NAME, keypoints_of(NAME, list(COCO.keypoint_names)))
    sets = ["keypoints_coco_2017_train", NAME]
    assert create_keypoint_hflip_indices(sets) == create_keypoint_hflip_indices(sets[:1])


def test_what_is_registered_counts():
    DatasetCatalog.register(NAME, list)
    MetadataCatalog.get(NAME).set(keypoint_names=["left", "right", "top"], keypoint_flip_map=[])
    assert keypoints_of(NAME) == Keypoints(3, ("left", "right", "top"), ())
    assert keypoints_of(NAME, ["left", "right", "top"]).number == 3
    with pytest.raises(UserError, match=r"KEYPOINT_NAMES is \['top'\].*keypoint_names \['left', 'right', 'top'\]"):
        keypoints_of(NAME, ["top"])
    with pytest.raises(UserError, match=r"KEYPOINT_FLIP_PAIRS is \[\['left', 'right'\]\].*keypoint_flip_map \[\]"):
        keypoints_of(NAME, (), [["left", "right"]])


def test_what_is_not_known_is_not_compared():
    DatasetCatalog.register(NAME, list)
    assert keypoints_of(NAME) == Keypoints(None, None, ())
    check_number_of_keypoints(NAME, Keypoints(), "KEY", 17)
    check_same_keypoints({"a": Keypoints(2, ("x", "y")), "b": Keypoints(2), "c": Keypoints(2, ("x", "y"))})
    with pytest.raises(UserError, match="c has .*'y', 'x'.* a has"):
        check_same_keypoints({"a": Keypoints(2, ("x", "y")), "b": Keypoints(2), "c": Keypoints(2, ("y", "x"))})


@pytest.mark.parametrize(
    "sigmas, number, said",
    [
        ([], 17, None),
        ([0.05, 1, 0.1], 3, None),
        ([], 3, r"SIGMAS is empty.*17 .*NUMBER is 3.*\[0.05, 0.05, 0.05\]"),
        ([0.05], 3, "SIGMAS has 1 values, but NUMBER is 3"),
        ([0.05, 0, 0.1], 3, r"SIGMAS is \[0.05, 0, 0.1\]"),
        ([0.05, "x", 0.1], 3, r"SIGMAS is \[0.05, 'x', 0.1\]"),
        ([0.05, float("nan"), 0.1], 3, "SIGMAS is .*nan"),
    ],
)
def test_sigmas(sigmas, number, said):
    if said is None:
        check_sigmas("SIGMAS", sigmas, "NUMBER", number)
    else:
        with pytest.raises(UserError, match=said):
            check_sigmas("SIGMAS", sigmas, "NUMBER", number)
