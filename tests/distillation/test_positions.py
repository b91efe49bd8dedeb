"""Reading MODEL.MGD.POSITIONS and pairing the features of two nets."""

import pytest
import torch

from mgd_det.distillation import Position
from mgd_det.distillation.positions import make_positions, parse_position
from mgd_det.errors import ArgumentError

STUDENT = {"res2": None, "res2.expansion": None, "res5": None}
TEACHER = {"res2": None, "res4": None, "res5": None}


def maps(**shapes):
    return {name: torch.zeros(1, channels, *size) for name, (channels, size) in shapes.items()}


@pytest.mark.parametrize(
    "text, pair",
    [
        ("res2", ["res2", "res2"]),
        ("res2=res4", ["res2", "res4"]),
        ("res2.expansion=res2", ["res2.expansion", "res2"]),
    ],
)
def test_a_position_is_one_name_or_two(text, pair):
    assert parse_position(text, STUDENT, TEACHER) == pair


@pytest.mark.parametrize(
    "text, named",
    [
        ("res9", ["student", "'res9'", "res2, res2.expansion, res5"]),
        ("res4", ["student", "'res4'", "res2, res2.expansion, res5"]),
        ("res2.expansion", ["teacher", "'res2.expansion'", "res2, res4, res5"]),
        ("res2=res3", ["teacher", "'res3'", "res2, res4, res5"]),
        ("=res2", ["student", "''", "res2, res2.expansion, res5"]),
        ("res2=res2=res2", ["teacher", "res2, res4, res5"]),
        ("", ["student", "''", "res2, res2.expansion, res5"]),
    ],
)
def test_a_feature_that_a_net_lacks_is_named_with_the_candidates(text, named):
    with pytest.raises(ArgumentError) as error:
        parse_position(text, STUDENT, TEACHER)
    for part in ["positions", repr(text), *named]:
        assert part in str(error.value)


def test_a_net_that_declares_no_feature():
    with pytest.raises(ArgumentError, match="declares none.*distillation_features"):
        parse_position("res2", STUDENT, {})


def test_pairs_keep_their_order_and_get_the_channels_measured():
    student = maps(res5=(6, (2, 3)), res2=(4, (8, 12)))
    teacher = maps(res2=(16, (8, 12)), res5=(25, (2, 3)))
    assert make_positions([["res5", "res5"], ["res2", "res2"]], student, teacher) == [
        Position("res5", "res5", 6, 25),
        Position("res2", "res2", 4, 16),
    ]


def test_the_name_is_the_students_without_a_dot():
    position = Position("res2.expansion", "res2", 4, 8)
    assert position.name == "res2_expansion"
    torch.nn.ModuleDict({position.name: torch.nn.Identity()})


@pytest.mark.parametrize("size", [(4, 12), (8, 6), (12, 8), (1, 1)])
def test_maps_of_different_size_are_named_with_the_candidates(size):
    student = maps(res2=(4, (8, 12)), res3=(4, (4, 6)))
    teacher = maps(res2=(16, size), res5=(16, (1, 2)))
    with pytest.raises(ArgumentError) as error:
        make_positions([["res2", "res2"]], student, teacher)
    sizes = f"{size[0]} x {size[1]}"
    for part in ["positions", "'res2' is 8 x 12", f"'res2' is {sizes}", "res3 4 x 6", "res5 1 x 2"]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "pairs",
    [
        [["res2", "res2"], ["res2", "res2"]],
        [["res2", "res2"], ["res3", "res3"], ["res2", "res3"]],
        [["res2.x", "res2"], ["res2_x", "res2"]],
    ],
)
def test_a_student_feature_named_twice(pairs):
    names = ("res2", "res3", "res2.x", "res2_x")
    features = maps(**{name: (4, (8, 12)) for name in names})
    with pytest.raises(ArgumentError, match="positions.*res2.*more than once"):
        make_positions(pairs, features, features)


def test_a_teacher_feature_may_serve_two_positions():
    features = maps(res2=(4, (8, 12)), res3=(4, (8, 12)))
    positions = make_positions([["res2", "res2"], ["res3", "res2"]], features, features)
    assert [p.name for p in positions] == ["res2", "res3"]
