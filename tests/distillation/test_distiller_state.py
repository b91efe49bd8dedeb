"""The distiller's norm layers and parameters, and the state that a checkpoint keeps of it."""

import copy

import pytest
import torch
from detectron2.layers import BatchNorm2d
from torch import nn
from toy_distiller import GROUPS, POSITIONS, WIDE, WIDE_GROUPS, features, margins, matched, mean_square, partial_l2

from mgd_det.distillation import Distiller, Position
from mgd_det.errors import UserError


@pytest.mark.parametrize("channels, groups", [(64, 32), (24, 8), (96, 32), (320, 32), (7, 1), (32, 16), (16, 8)])
def test_group_norm_falls_back_to_the_greatest_common_divisor_and_groups_of_two(channels, groups):
    norm = Distiller([Position("a", "a", channels, channels)]).norms["a"]
    assert isinstance(norm, nn.GroupNorm) and (norm.num_groups, norm.num_channels) == (groups, channels)


@pytest.mark.parametrize("norm, kind", [("BN", BatchNorm2d), ("SyncBN", nn.SyncBatchNorm), ("", nn.Identity)])
def test_norm_layers_by_name(norm, kind):
    assert [type(layer) for layer in Distiller(POSITIONS, norm=norm).norms.values()] == [kind, kind]


@pytest.mark.parametrize("norm, number", [("GN", 4), ("BN", 4), ("", 0)])
def test_only_the_norms_have_parameters(norm, number):
    distiller = matched(norm=norm)
    names = [name for name, _ in distiller.named_parameters()]
    assert len(names) == number and all(name.startswith("norms.") for name in names)


def test_a_state_dict_holds_nothing_of_the_matching():
    assert set(matched(norm="GN").state_dict()) == {
        "norms.res2.weight",
        "norms.res2.bias",
        "norms.res5.weight",
        "norms.res5.bias",
    }


def test_the_matching_follows_to_another_device():
    distiller = matched().to("meta")
    for p in POSITIONS:
        tensors = distiller.groups(p), distiller.margin(p), distiller.mean_square(p)
        assert {x.device.type for x in tensors} == {"meta"}


def test_a_deep_copy_has_a_matching_of_its_own():
    distiller = matched()
    other = copy.deepcopy(distiller)
    other.margin(POSITIONS[0]).zero_()
    assert distiller.margin(POSITIONS[0]).max() < 0 and other.is_matched


@pytest.mark.parametrize("reducer", ["amp", "sm"])
@pytest.mark.parametrize("norm", ["GN", "BN", ""])
def test_state_round_trip(reducer, norm, tmp_path):
    distiller = matched(reducer=reducer, norm=norm)
    distiller(*features(seed=5))  # a running statistic of BN moves
    torch.save(distiller.distillation_state(), tmp_path / "state.pth")
    other = Distiller(POSITIONS, reducer=reducer, norm=norm, losses=partial_l2())
    other.load_distillation_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert other.is_matched
    for mode in (True, False):
        one, two = (d.train(mode)(*features()) for d in (distiller, other))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_state_round_trip_with_unmatched_channels():
    distiller = matched([WIDE], WIDE_GROUPS, norm="")
    other = Distiller([WIDE], norm="", losses=partial_l2())
    other.load_distillation_state(distiller.distillation_state())
    inputs = features(positions=[WIDE])
    assert torch.equal(distiller(*inputs)["loss_mgd_res2"], other(*inputs)["loss_mgd_res2"])


def test_state_before_the_first_matching():
    other = Distiller(POSITIONS)
    other.load_distillation_state(Distiller(POSITIONS).distillation_state())
    assert not other.is_matched


def test_state_is_a_copy():
    distiller = matched()
    state = distiller.distillation_state()
    kept = copy.deepcopy(state)
    p = POSITIONS[0]
    distiller.set_matching(p, groups=GROUPS["res2"].flip(0), margin=margins(p) - 1, mean_square=mean_square(p) + 1)
    with torch.no_grad():
        for parameter in distiller.parameters():
            parameter.add_(1)
    assert_equal_states(state, kept)


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_equal_states(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


RES2, RES5 = POSITIONS
WRONG_STATES = {
    "other positions": (lambda: matched([RES2]), "POSITIONS"),
    "another order": (lambda: matched([RES5, RES2]), "POSITIONS"),
    "other names": (
        lambda: matched([RES2, Position("res4", "res4", 4, 8)], {**GROUPS, "res4": GROUPS["res5"]}),
        "POSITIONS",
    ),
    "fewer student channels": (
        lambda: matched([RES2, Position("res5", "res5", 2, 8)], {**GROUPS, "res5": torch.arange(8).view(2, 4)}),
        "res5",
    ),
    "more teacher channels": (lambda: matched([RES2, Position("res5", "res5", 4, 9)]), "res5"),
    "batch norm": (lambda: matched(norm="BN"), "MODEL.MGD.NORM"),
    "no norm": (lambda: matched(norm=""), "MODEL.MGD.NORM"),
}


@pytest.mark.parametrize("name", list(WRONG_STATES))
def test_a_state_of_another_config_changes_nothing(name):
    make, named = WRONG_STATES[name]
    source = make()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(5)
    for norm in ("GN", "") if "norm" not in name else ("GN",):
        distiller = matched(norm=norm)
        before, state = distiller.distillation_state(), source.distillation_state()
        if norm == "":  # which has no tensor that could fail to fit; as version 0.1 saved it
            del state["fingerprint"]
        with pytest.raises(UserError, match=named):
            distiller.load_distillation_state(state)
        assert_equal_states(distiller.distillation_state(), before)


@pytest.mark.parametrize("before, after", [("amp", "sm"), ("rd", "sm"), ("sm", "amp")])
def test_a_state_of_another_reducer(before, after):
    """Groups of another size: a user's slip, to be named at once and not by a traceback in the first step.

    A single member serves "amp" as well, so that there the state may also be taken.
    """
    distiller = matched(reducer=after, norm="")
    state = matched(reducer=before, norm="").distillation_state()
    if after == "sm":
        with pytest.raises(UserError, match="MODEL.MGD.REDUCER"):
            distiller.load_distillation_state(state)
    else:
        try:
            distiller.load_distillation_state(state)
        except UserError as e:
            assert "MODEL.MGD.REDUCER" in str(e)
        distiller(*features())


PKD = {"pkd": {"weights": 1.0}}
OTHERS = {
    "reducer": ({"reducer": "amp"}, {"reducer": "rd"}, "MODEL.MGD.REDUCER", "'amp'", "'rd'"),
    "norm": ({"norm": "BN"}, {"norm": "SyncBN"}, "MODEL.MGD.NORM", "'BN'", "'SyncBN'"),
    "norm groups": ({"norm_groups": 1}, {"norm_groups": 32}, "MODEL.MGD.NORM_GROUPS", "1", "32"),
    "scale": ({"scale": "mean"}, {"scale": "target"}, "MODEL.MGD.LOSS.PARTIAL_L2.SCALE", "'mean'", "'target'"),
    "scale of l2": (
        {"losses": {"l2": {"scale": "target"}}},
        {"losses": {"l2": {"scale": "mean"}}},
        "MODEL.MGD.LOSS.L2.SCALE",
        "'target'",
        "'mean'",
    ),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_a_state_whose_tensors_fit_another_setting_is_refused(name):
    of_checkpoint, now, key, theirs, own = OTHERS[name]
    state = matched(**of_checkpoint).distillation_state()
    distiller = matched(**now)
    before = distiller.distillation_state()
    with pytest.raises(UserError, match=f"{key} {theirs}, .*{own}: .*new OUTPUT_DIR") as error:
        distiller.load_distillation_state(state)
    assert str(error.value).count("MODEL.MGD") == 1
    assert_equal_states(distiller.distillation_state(), before)
    matched(**of_checkpoint).load_distillation_state(state)
    del state["fingerprint"]  # as version 0.1 saved it
    distiller.load_distillation_state(state)


def test_all_that_differs_is_named_at_once():
    state = matched(reducer="rd", scale="mean").distillation_state()
    with pytest.raises(UserError, match="MODEL.MGD.REDUCER 'rd'.*MODEL.MGD.LOSS.PARTIAL_L2.SCALE 'mean'"):
        matched().load_distillation_state(state)


def test_another_teacher_is_refused_and_an_unknown_one_is_not():
    source, same, other, unknown = (matched() for _ in range(4))
    source.teacher_hash = same.teacher_hash = "0123abcd"
    other.teacher_hash = "ffff0000"
    state = source.distillation_state()
    with pytest.raises(UserError, match="MODEL.MGD.TEACHER 'weights 0123abcd', .*'weights ffff0000'"):
        other.load_distillation_state(state)
    same.load_distillation_state(state)
    unknown.load_distillation_state(state)


def test_a_teacher_with_other_heads_is_refused_where_both_have_some():
    source, other, without = (matched() for _ in range(3))
    for distiller, heads in ((source, "0000aaaa"), (other, "0000bbbb"), (without, "")):
        distiller.teacher_hash, distiller.detector_hash = "0123abcd", heads
    with pytest.raises(UserError, match="TEACHER with its heads 'weights 0000aaaa', .*'weights 0000bbbb'"):
        other.load_distillation_state(source.distillation_state())
    without.load_distillation_state(source.distillation_state())
    source.load_distillation_state(without.distillation_state())  # an older checkpoint


def test_settings_that_no_loss_uses_may_change():
    """PKD alone has no norm layer; losses and weights may come and go."""
    state = matched(losses=PKD, norm="GN", norm_groups=2).distillation_state()
    matched(losses=PKD, norm="BN").load_distillation_state(state)
    state = matched(losses={**PKD, **partial_l2(scale="mean")}).distillation_state()
    matched(losses={**PKD, "l2": {"weights": 2.0, "scale": "target"}}).load_distillation_state(state)
