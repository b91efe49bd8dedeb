"""The measuring of time and memory."""

import os
import time

import pytest
import torch

from mgd_det.benchmark import interleaved, peak_bytes


def test_functions_take_turns_and_warm_up_rounds_do_not_count():
    calls, rounds = [], []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    measures = interleaved(functions, repeats=3, warmup=1, progress=lambda *of: rounds.append(of))
    assert calls == ["a", "b"] * 4 and rounds == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(m.times) for m in measures.values()] == [3, 3]


def test_the_median_is_of_the_time_that_passes():
    naps = iter([0.2, 0.05, 0.05, 0.8])
    (measure,) = interleaved({"nap": lambda: time.sleep(next(naps))}, repeats=3, warmup=1).values()
    assert 0.05 <= measure.median < 0.6 and max(measure.times) >= 0.8


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_peak_memory_is_what_is_held_at_once():
    def hold(times):
        kept = [torch.ones(8 << 20) for _ in range(times)]  # 32 MiB each
        return len(kept)

    cpu = torch.device("cpu")
    assert peak_bytes(lambda: hold(1), cpu) == pytest.approx(32 << 20, rel=0.2)
    assert peak_bytes(lambda: hold(4), cpu) == pytest.approx(128 << 20, rel=0.2)
    assert peak_bytes(lambda: [hold(1) for _ in range(4)], cpu) == pytest.approx(32 << 20, rel=0.3)
