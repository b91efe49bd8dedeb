"""The measuring of time and memory."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from mgd_det.benchmark import Spread, interleaved, ratio


def test_functions_take_turns_and_warm_up_rounds_do_not_count():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(functions, repeats=7, warmup=1)
    orders = ["".join(calls[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders) and len(set(orders)) > 2
    assert [len(of) for of in times.values()] == [7, 7, 7]


def test_times_are_of_what_passes():
    naps = iter([0.2, 0.05, 0.3])
    times = interleaved({"nap": lambda: time.sleep(next(naps))}, repeats=2, warmup=1)["nap"]
    assert 0.05 <= times[0] < times[1] and times[1] >= 0.3


def test_median_and_quartiles():
    values = [3.0, 1.0, 10.0, 2.0]
    spread = Spread.of(values)
    assert (spread.lower, spread.median, spread.upper) == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_ratio_is_that_of_each_round():
    """A machine that gets three times as slow changes the medians, not the ratio."""
    over, under, more = [2.0, 6.0, 6.0], [0.5, 1.5, 1.5], [0.5, 1.5, 1.5]
    assert ratio(over, under, more) == Spread(2.0, 2.0, 2.0)
    assert ratio([2.0, 2.0, 9.0], [1.0, 2.0, 3.0]).median == 2.0
    assert ratio([1.0], [0.0]) is None


PEAKS = """
import torch
from mgd_det.benchmark import peak_bytes

def hold(times):
    kept = [torch.ones(8 << 20) for _ in range(times)]  # 32 MiB each
    return len(kept)

hold(1)  # what torch loads when it is first used
for function in (lambda: hold(1), lambda: hold(4), lambda: [hold(1) for _ in range(4)]):
    print(peak_bytes(function, torch.device("cpu")))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
@pytest.mark.slow
def test_peak_memory_is_what_is_held_at_once():
    # In a process of its own: gaps that others left in the C library's heap fill up before they are used again.
    result = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, timeout=120)
    once, four, one_by_one = (int(line) / 2**20 for line in result.stdout.split())
    assert once == pytest.approx(32, rel=0.2)
    assert four == pytest.approx(128, rel=0.2)
    assert one_by_one == pytest.approx(32, rel=0.3)
