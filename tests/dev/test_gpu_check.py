"""The check of what only a GPU shows: how it runs its parts, and what it makes of their results."""

import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import programs
import pytest
from gpu_check import page, parts, processes
from gpu_check.measuring import Records

from mgd_det.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable


def program():
    return programs.load("dev/gpu_check.py")


@dataclass(frozen=True)
class StandIn(parts.Part):
    """A part that runs a piece of Python; ``output`` is the json that it may write."""

    code: str = ""

    def command(self, output, dry_run, photos, seconds):
        return [PYTHON, "-c", f"import json, os, sys, time\noutput = {output!r}\n{self.code}"]


PASSES = "print('tests/gpu/a.py::test_one[3-x y] PASSED [ 50%]\\ntests/gpu/a.py::test_two SKIPPED (no card)')"
FAILS = "print('tests/gpu/b.py::test_one PASSED\\ntests/gpu/b.py::test_two FAILED'); sys.exit(1)"
CRASHES = "print('tests/gpu/c.py::test_one PASSED', flush=True); os.abort()"
MEASURES = "json.dump([{'of': 'a row'}], open(output, 'w'))"


def run(monkeypatch, tmp_path, *stand_ins, seconds=60):
    module = program()
    monkeypatch.setattr(module, "chosen", lambda names: list(stand_ins))
    monkeypatch.setattr(module, "tables", lambda parts: [])
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.2)
    output = tmp_path / "check.json"
    args = module.parse_args(["--dry-run", "--output", str(output), "--seconds", str(seconds)])
    monkeypatch.setattr(module, "_DRY_SECONDS", 3.0)
    status = module.run(args)
    return status, json.loads(output.read_text())["parts"]


def test_tests_that_pass_and_a_part_that_measures(monkeypatch, tmp_path):
    status, results = run(
        monkeypatch, tmp_path, StandIn("a", "correct", 9, code=PASSES), StandIn("s", "speed", 9, code=MEASURES)
    )
    assert status == 0
    assert results["a"]["status"] == results["s"]["status"] == "done"
    assert results["a"]["result"] == {
        "tests/gpu/a.py::test_one[3-x y]": "PASSED",
        "tests/gpu/a.py::test_two": "SKIPPED",
    }
    assert results["s"]["result"] == [{"of": "a row"}]


@pytest.mark.parametrize(
    "code, status, result",
    [
        (FAILS, "failed (status 1)", {"tests/gpu/b.py::test_one": "PASSED", "tests/gpu/b.py::test_two": "FAILED"}),
        (CRASHES, "failed (status -6)", {"tests/gpu/c.py::test_one": "PASSED"}),
        (CRASHES.replace("os.abort()", "time.sleep(60)"), "out of time", {"tests/gpu/c.py::test_one": "PASSED"}),
        ("print('no tests ran')", "failed (status 0)", {}),
    ],
    ids=["a failure", "a crash", "a hang", "no test"],
)
def test_tests_that_do_not_pass_decide_the_exit_status_and_the_rest_runs(monkeypatch, tmp_path, code, status, result):
    of_tests = StandIn("a", "correct", 9, code=code)
    exit_status, results = run(monkeypatch, tmp_path, of_tests, StandIn("s", "speed", 9, code=MEASURES))
    assert exit_status == 1
    assert (results["a"]["status"], results["a"]["result"]) == (status, result)
    assert results["s"]["status"] == "done"


def test_a_part_that_measures_keeps_what_it_had_and_does_not_decide_the_exit_status(monkeypatch, tmp_path):
    cut = StandIn("s", "speed", 9, code=f"{MEASURES}; time.sleep(60)")
    crashed = StandIn("t", "teacher", 9, code="sys.exit('out of memory')")
    status, results = run(monkeypatch, tmp_path, StandIn("a", "correct", 9, code=PASSES), cut, crashed)
    assert status == 0
    assert (results["s"]["status"], results["s"]["result"]) == ("out of time", [{"of": "a row"}])
    assert results["t"]["status"] == "failed (status 1)" and results["t"]["log"][-1] == "out of memory"


def test_what_no_time_is_left_for_is_not_started(monkeypatch, tmp_path):
    first = StandIn("a", "correct", 9, code=PASSES)
    status, results = run(monkeypatch, tmp_path, first, StandIn("s", "speed", 9, code=MEASURES), seconds=1)
    assert status == 1  # the tests did not run
    assert [part["status"] for part in results.values()] == ["not started", "not started"]


FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_program_that_is_late_is_ended_with_what_it_started(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.2)
    commands = {"late": ([PYTHON, "-c", FAMILY], 2.0), "good": ([PYTHON, "-c", "print('done')"], 60.0)}
    logs = {name: tmp_path / name for name in commands}
    outcomes = dict(processes.run_side_by_side(commands, logs, {}, tmp_path))
    assert outcomes["late"].status is None and 2.0 < outcomes["late"].seconds < 20.0
    assert outcomes["good"].status == 0 and logs["good"].read_text() == "done\n"
    child = int(logs["late"].read_text())
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def test_as_many_run_at_the_same_time_as_there_are_workers(tmp_path):
    code = "import time; print(time.monotonic()); time.sleep(0.5); print(time.monotonic())"
    names = ["a", "b", "c", "d"]
    logs = {name: tmp_path / name for name in names}
    commands = {name: ([PYTHON, "-c", code], 60.0) for name in names}
    ended = [name for name, _ in processes.run_side_by_side(commands, logs, {}, tmp_path, workers=2)]
    spans = {name: [float(line) for line in logs[name].read_text().split()] for name in names}
    assert sorted(ended) == names
    for start, _ in spans.values():
        assert sum(first <= start < last for first, last in spans.values()) <= 2
    assert min(spans["a"][1], spans["b"][1]) < min(spans["c"][0], spans["d"][0])


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_measurement_that_fails_does_not_stop_the_next(tmp_path):
    records = Records(str(tmp_path / "a.json"))

    def fails():
        raise RuntimeError("no compiler\nat all")

    records.measure(fails, batch=2)
    records.measure(lambda: {"value": 3}, batch=4)
    assert json.loads((tmp_path / "a.json").read_text()) == [
        {"batch": 2, "error": "RuntimeError: no compiler"},
        {"batch": 4, "value": 3},
    ]


def test_parts_by_name_and_kind():
    assert [p.name for p in parts.chosen([])] == [p.name for p in parts.PARTS]
    names = [p.name for p in parts.chosen(["loss", "correct", "mask_rcnn_R_18"])]
    assert names == ["matching", "compiled", "training", "nccl", "loss_pass", "mask_rcnn_R_18"]
    with pytest.raises(UserError, match="'losses' is no part.*loss_pass"):
        parts.chosen(["losses"])


def test_the_limits_leave_time_for_trainings():
    together = max(p.seconds for p in parts.PARTS if p.kind == "correct")
    others = sum(p.seconds for p in parts.PARTS if p.kind not in ("correct", "accuracy"))
    assert together + others <= program().parse_args([]).seconds - 60
    for part in parts.PARTS:
        assert all((ROOT / file).exists() for file in part.files)
        assert not part.config or (ROOT / "configs" / part.config).exists()


# ------------------------------------------------------------------ the page
def spread(median):
    return {"median": median, "lower": median - 0.01, "upper": median + 0.01}


def speed_row(both, share, waits):
    times = ("plain_step", "distilled_step", "teacher_bottom_up", "distillation_part", "plain_part", "naive_part")
    ratios = {"distilled / (plain + teacher)": both, "distilled / plain": 1.2, "online / distilled": 1.01}
    ratios["copies / distillation part"] = share
    return {
        "config": "COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml",
        "batch": 16,
        "amp": True,
        "times_s": {name: spread(0.1 * (i + 1)) for i, name in enumerate(times)},
        "ratios": {name: spread(value) for name, value in ratios.items()},
        "peak_bytes": {"plain_step": 2**30, "distilled_step": 3 * 2**29},
        "host_waits": {"plain_step": 2, "distilled_step": 2 + waits},
        "profile": "operation  share\nconv  80 %",
    }


def results(row, **about):
    found = {
        "training": {"kind": "correct", "status": "failed (status 1)", "seconds": 31.4, "result": {"a::b": "FAILED"}},
        "retinanet_R_18": {"kind": "speed", "status": "out of time", "seconds": 65, "result": [row]},
    }
    facts = {"device": "H100", "torch": "2.11", "python": "3.12", "commit": "abc", "dry_run": False, **about}
    return {"about": facts, "parts": found}


def test_the_tables_have_the_figures_and_what_was_missed():
    text = page.section(results(speed_row(both=1.2, share=0.5, waits=1)))
    assert text.startswith("H100, torch 2.11, Python 3.12, commit abc.")
    assert "`a::b` did not pass" in text and "31 s" in text
    row = next(line for line in text.splitlines() if "retinanet_R_18_FPN" in line)
    for cell in ("mixed, batch 16", "100.0 ms", "1.20 (1.19 to 1.21)", "50 %", "1.0 / 1.5", "2 / 3"):
        assert cell in row
    missed = [line for line in text.splitlines() if "Missed" in line]
    assert len(missed) == 3 and "1.05" in missed[0] and "60 %" in missed[1] and "adds 1 host waits" in missed[2]
    assert "`retinanet_R_18` out of time" in text and "    conv  80 %" in text
    met = page.section(results(speed_row(both=1.04, share=0.7, waits=0)))
    assert "Missed" not in met


def test_a_row_that_failed_says_why():
    row = {"config": "a/b.yaml", "batch": 2, "amp": False, "error": "OutOfMemoryError: 80 GiB | all"}
    assert "`b`, float32, batch 2 | OutOfMemoryError: 80 GiB / all" in page.section(results(row))


def test_a_page_gets_its_section_and_keeps_the_rest(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"# Title\n\n{page.BEGIN}old\n{page.END}\n\nThe end.\n")
    page.write_section(path, "new\n")
    assert path.read_text() == f"# Title\n\n{page.BEGIN}new\n{page.END}\n\nThe end.\n"
    path.write_text("# No marker\n")
    with pytest.raises(UserError, match="--page .*page.md"):
        page.write_section(path, "new\n")
    assert path.read_text() == "# No marker\n"


def test_the_docs_have_a_place_for_the_tables():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    content = text.split(page.BEGIN)[1].split(page.END)[0]
    assert content == page.NOT_RUN or "| tests -m gpu |" in content


def test_a_dry_run_is_not_put_into_a_page(tmp_path, capsys):
    with pytest.raises(UserError, match="dry run"):
        page.section(results(speed_row(1.0, 0.9, 0), dry_run=True))
    module = program()
    with pytest.raises(UserError, match="--output .*none.json"):
        module.run(module.parse_args(["--output", str(tmp_path / "none.json"), "--page", "docs/performance.md"]))


def test_without_a_gpu_it_asks_for_a_dry_run(monkeypatch, tmp_path):
    module = program()
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--dry-run"):
        module.run(module.parse_args(["--output", str(tmp_path / "a.json")]))


# ------------------------------------------------------------------ all of it
def write_photos(folder):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = np.zeros((20, 28, 28), np.uint8)
        images[:, 5:23, 6:22] = generator.integers(90, 250, (20, 18, 16))
        labels = np.arange(20, dtype=np.uint8) % 10
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / name).write_bytes(header + array.tobytes())
    return folder


@pytest.mark.timeout(900)
def test_the_dry_run(tmp_path):
    photos, output = write_photos(tmp_path / "photos"), tmp_path / "check.json"
    command = [PYTHON, str(ROOT / "dev" / "gpu_check.py"), "--dry-run", "--output", output, "--photos", photos]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["about"]["dry_run"] and list(found["parts"]) == [p.name for p in parts.PARTS]
    for name, part in found["parts"].items():
        assert part["status"] == "done", (name, part)
        rows = part["result"] if part["kind"] != "correct" else []
        assert part["kind"] == "correct" or rows
        assert not [row["error"] for row in rows if "error" in row], name
    of_tests = [outcome for p in found["parts"].values() if p["kind"] == "correct" for outcome in p["result"].values()]
    assert of_tests.count("PASSED") > 60 and set(of_tests) <= {"PASSED", "SKIPPED"}
    assert {row["arm"] for row in found["parts"]["accuracy"]["result"]} == {"alone", "distilled"}
    assert "retinanet_R_18_FPN_mgd_R50_recommended_1x" in done.stdout and "| bottom-up |" in done.stdout
