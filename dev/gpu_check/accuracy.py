"""Part "accuracy": trainings on FashionScenes by the study's runner, for as long as there is time."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List

import yaml

from gpu_check.measuring import save_json
from gpu_check.parts import ROOT

STUDY = Path(__file__).with_suffix(".yaml")
_PROJECT = ROOT / "projects" / "AccuracyStudy"
_SECONDS_TO_STOP = 15.0  # for the runner to end its trainings, and the rows to be saved
_DRY_OVERRIDES = {
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": [],
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SOLVER.IMS_PER_BATCH": 2,
    "MODEL.DEVICE": "cpu",
}


def measure_accuracy(output: str, photos: str, seconds: float, dry_run: bool) -> None:
    """Run the study in a temporary folder and save its rows.

    Args:
        photos: folder of the Fashion-MNIST files; "" to find or download them.
        seconds: what it may take.
    """
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        try:
            _run_study(Path(folder), output, photos, seconds, dry_run)
        finally:
            save_json(output, rows_of(Path(folder) / "results.csv"))


def _run_study(folder: Path, output: str, photos: str, seconds: float, dry_run: bool) -> None:
    start = time.monotonic()
    numbers = ["--train", "4", "--val", "2"] if dry_run else []
    scenes = [sys.executable, str(ROOT / "tools" / "prepare_fashion_scenes.py"), "small", "--root", str(folder)]
    subprocess.run([*scenes, *numbers, *(["--photos", photos] if photos else [])], check=True)
    workers = 1 if dry_run else max((os.cpu_count() or 1) * 3 // 4, 1)
    command = [sys.executable, str(_PROJECT / "run.py"), str(_study_file(folder, dry_run)), "--workers", str(workers)]
    command += ["--results", str(folder / "results.csv"), "--output-dir", str(folder / "study")]
    runner = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "DETECTRON2_DATASETS": str(folder)})
    try:
        status = runner.wait(max(seconds - _SECONDS_TO_STOP - (time.monotonic() - start), 1.0))
    except subprocess.TimeoutExpired:
        save_json(output, rows_of(folder / "results.csv"))  # before anything that may take too long
        runner.send_signal(signal.SIGTERM)
        runner.wait()
        print(f"The study was stopped after {seconds:.0f} s.")
        return
    if status != 0:
        raise RuntimeError(f"the study ended with status {status}: see above")


def _study_file(folder: Path, dry_run: bool) -> Path:
    if not dry_run:
        return STUDY
    content = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    content["seeds"] = content["seeds"][:1]
    content["overrides"].update(_DRY_OVERRIDES)
    path = folder / STUDY.name
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def rows_of(path: Path) -> List[Dict[str, Any]]:
    """Return the rows of a study's csv; none if it does not exist."""
    sys.path.insert(0, str(_PROJECT))
    from accuracy_study.results import read_results

    return [asdict(row) for row in read_results(path)] if path.exists() else []
