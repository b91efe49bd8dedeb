"""Progress in the log."""

import logging
import time

from mgd_det.progress import ProgressLog


def test_a_line_every_ten_seconds_with_the_time_left(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = ProgressLog(logging.getLogger("mgd_det.test"), "Reading")
    with caplog.at_level(logging.INFO, "mgd_det.test"):
        for done in range(1, 7):
            now[0] += 4
            progress(done, 8)
    # After 12 s with 3 of 8 parts done, 5 parts take 20 s; the next line comes 12 s later.
    assert [record.getMessage() for record in caplog.records] == [
        "Reading: 3/8, about 20 s left",
        "Reading: 6/8, about 8 s left",
    ]
