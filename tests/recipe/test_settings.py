import pytest

from mgd_det.errors import UserError
from mgd_det.recipe import Settings


def test_what_differs_from_the_base_config_and_why():
    settings = Settings("Base-RetinaNet.yaml")
    assert settings.differences() == []
    settings.set("SOLVER.BASE_LR", 0.005, "half of it")
    settings.set("SOLVER.MAX_ITER", 90000, "no change")
    settings.set("MODEL.FPN", {"OUT_CHANNELS": 64, "IN_FEATURES": ("res3", "res4", "res5")}, "narrow")
    settings.override(["SEED", "3"])
    assert settings.differences() == [
        ("MODEL.FPN.OUT_CHANNELS", 64, "narrow"),
        ("SOLVER.BASE_LR", 0.005, "half of it"),
        ("SEED", 3, "your override"),
    ]
    assert settings.cfg.MODEL.FPN.IN_FEATURES == ["res3", "res4", "res5"]  # keeps its type
    row = next(line for line in str(settings).splitlines() if line.startswith("SOLVER.BASE_LR"))
    assert row.split()[1] == "0.005" and row.endswith("half of it")


def test_an_override_wins_over_what_was_set():
    settings = Settings("Base-RetinaNet.yaml")
    settings.set("SOLVER.BASE_LR", 0.005, "half of it")
    settings.override(["SOLVER.BASE_LR", "0.002"])
    assert settings.cfg.SOLVER.BASE_LR == 0.002 and settings.why("SOLVER.BASE_LR") == "your override"


@pytest.mark.parametrize("opts", [["SOLVER.NO_SUCH", "1"], ["SOLVER.BASE_LR"], ["MODEL.MGD.POSITIONS", "[3]"]])
def test_overrides_that_do_not_fit(opts):
    with pytest.raises(UserError, match=opts[0]):
        Settings("Base-RetinaNet.yaml").override(opts)
