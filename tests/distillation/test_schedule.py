"""Which steps distil, and with which part of the weight."""

import math

import pytest

from mgd_det.distillation.schedule import DECAYS, DistillationSchedule, decay_factor
from mgd_det.errors import ArgumentError


def distilled(schedule, max_iter):
    steps = []
    for i in range(max_iter):
        schedule.set_iteration(i, max_iter)
        steps += [i] if schedule.distils else []
    return steps


@pytest.mark.parametrize(
    "interval, stop, steps",
    [
        (1, 0, [0, 1, 2, 3, 4, 5, 6]),
        (2, 0, [0, 2, 4, 6]),
        (3, 4, [0, 3]),
        (1, 2, [0, 1]),
        (1, 9, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_which_steps_distil(interval, stop, steps):
    assert distilled(DistillationSchedule(interval, stop), 7) == steps


def test_a_loop_that_tells_no_iteration_always_distils_at_full_weight():
    schedule = DistillationSchedule(interval=4, stop_iter=3)
    assert schedule.distils and schedule.progress == 0


@pytest.mark.parametrize("stop, end", [(0, 8), (4, 4), (100, 8)])
def test_progress_is_of_the_distillation(stop, end):
    schedule = DistillationSchedule(stop_iter=stop)
    for i in range(8):
        schedule.set_iteration(i, 8)
        assert schedule.progress == pytest.approx(min(i / end, 1))
    assert schedule.end_iteration(8) == end


def test_decays():
    assert [decay_factor("constant", t / 4) for t in range(5)] == [1] * 5
    assert [decay_factor("linear", t / 4) for t in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    cosine = [1, math.cos(math.pi / 8) ** 2, 0.5, math.sin(math.pi / 8) ** 2, 0]
    assert [decay_factor("cosine", t / 4) for t in range(5)] == pytest.approx(cosine)
    assert set(DECAYS) == {"constant", "linear", "cosine"}


@pytest.mark.parametrize(
    "options, named",
    [
        ({"interval": 0}, "interval.*0"),
        ({"stop_iter": -1}, "stop_iter.*-1"),
        ({"stop_iter": 10.5}, "stop_iter.*10.5"),
        ({"stop_iter": True}, "stop_iter.*True"),
        ({"stop_iter": "100"}, "stop_iter.*'100'"),
    ],
)
def test_a_wrong_value_is_named(options, named):
    with pytest.raises(ArgumentError, match=named):
        DistillationSchedule(**options)


@pytest.mark.parametrize("interval", [2.0, 1e3, 10.5, True, "2"])
def test_an_interval_that_is_not_a_whole_number_is_refused(interval):
    with pytest.raises(ArgumentError, match=f"^interval is {interval!r}; give a whole number > 0"):
        DistillationSchedule(interval=interval)
