"""When the report is written, and that it never fails a training."""

import logging
from types import SimpleNamespace

import pytest

from mgd_det.engine.hooks import report
from mgd_det.engine.hooks.report import ReportHook, peak_memory
from mgd_det.visualization.report import Run


def hook_at(iteration, max_iter, build_run):
    hook = ReportHook(build_run)
    hook.trainer = SimpleNamespace(iter=iteration, max_iter=max_iter)
    return hook


def test_it_is_written_at_the_end_with_the_memory(monkeypatch):
    written = []
    monkeypatch.setattr(report, "write_report", lambda run: written.append(run) or ["report.html"])
    hook_at(4, 5, lambda: pytest.fail("the training did not come to its end")).after_train()
    assert written == []
    hook_at(5, 5, lambda: Run("folder", "RetinaNet")).after_train()
    (run,) = written
    assert run.folder == "folder" and run.memory["process"] > 10 * 2**20


def test_a_failure_is_one_warning(tmp_path, caplog):
    def build_run():
        raise RuntimeError("first line\nsecond line")

    with caplog.at_level(logging.INFO, "mgd_det"):
        for build in (build_run, lambda: Run(str(tmp_path), "no metrics.json")):
            hook_at(5, 5, build).after_train()
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in levels] == ["WARNING", "WARNING"]
    assert "RuntimeError: first line" in levels[0][1] and "second" not in levels[0][1]
    assert "metrics.json" in levels[1][1]


def test_memory_is_in_bytes():
    used = bytearray(200 * 2**20)
    used[::4096] = b"x" * len(used[::4096])
    assert 200 * 2**20 < peak_memory()["process"] < 2**37
