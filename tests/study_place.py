"""A folder with a study, whose trainings a stand-in takes the place of."""

import json
import sys
from pathlib import Path

from accuracy_study.results import ResultsFile, read_results
from accuracy_study.runner import StudyRunner
from accuracy_study.study import read_study

# Acts as train.py does, on its arguments only. A file in the study's folder makes it fail, stop or wait.
STAND_IN = """
import json, pathlib, signal, sys, time
argv = sys.argv[1:]
value = {key: argv[len(argv) - argv[::-1].index(key)] for key in
         ("OUTPUT_DIR", "SEED", "SOLVER.MAX_ITER", "MODEL.WEIGHTS", "--val-json") if key in argv}
folder = pathlib.Path(value["OUTPUT_DIR"])
study = pathlib.Path(sys.path[0])
with open(study / "calls.jsonl", "a") as file:
    file.write(json.dumps({"argv": argv, "time": time.time(), "end": False, **value}) + "\\n")
machine = {"torch": "2.0", "device": "cpu", "hardware": "abacus"}
if "--eval-only" in argv:
    assert value.get("--val-json", "instances_val.json").endswith("instances_val.json"), value
    assert pathlib.Path(value["MODEL.WEIGHTS"]).exists(), value
    scores = {"bbox": {"AP": 1.0, "AP50": 2.0, "AP75": 0.5}}
    (folder / "result.json").write_text(json.dumps({"scores": scores, **machine}))
    sys.exit(0)
iterations, seed = int(value["SOLVER.MAX_ITER"]), int(value["SEED"])
arm = folder.parent.name
print(f"  eta: 0:00:01  iter: 19  total_loss: 1.0  of {arm}", flush=True)
if (study / f"fail_{arm}_{seed}").exists():
    print("the disk is on fire", flush=True)
    sys.exit(3)
if (study / f"cut_{arm}_{seed}").exists():
    (folder / "last_checkpoint").write_text("model_0000019.pth")
    sys.exit(75)
if (study / "wait").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "stopped").write_text(""), sys.exit(75)))
    (folder / "waiting").write_text("")
    time.sleep(60)
time.sleep(0.15 if (study / "slow").exists() else 0)
(folder / "model_final.pth").write_text("")
cost = {"distilled": 0.15, "alone": 0.1}.get(arm, 0.1)
result = {
    "scores": {"bbox": {"AP": seed + iterations / 1000, "AP50": 20.0 + seed, "AP75": 5.0}},
    "iterations": iterations, "seconds": 3 * cost * iterations, "cpu_seconds": cost * iterations,
    "curve": {str(iterations // 2): 1.234, str(iterations): seed + iterations / 1000}, **machine,
}
(folder / "result.json").write_text(json.dumps(result))
with open(study / "calls.jsonl", "a") as file:
    file.write(json.dumps({"time": time.time(), "end": True}) + "\\n")
"""


STUDY = """
study: toy
seeds: [1, 2]
overrides: {SOLVER.MAX_ITER: 600, SOLVER.STEPS: [420, 540]}
arms:
  - {name: alone, config: FashionScenes/retinanet_MobileNetV2_FPN.yaml}
  - name: distilled
    config: FashionScenes/retinanet_MobileNetV2_FPN_mgd_R50.yaml
    overrides: {MODEL.MGD.TEACHER.WEIGHTS: TEACHER}
  - {name: same_time, like: alone, same_time_as: distilled}
"""


class Place:
    """A folder with a study, its csv and its stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "train.py").write_text(STAND_IN)
        self.teacher = folder / "teacher.pth"
        self.teacher.write_bytes(b"abc")
        self.write_study(STUDY)

    def write_study(self, text):
        (self.folder / "study.yaml").write_text(text.replace("TEACHER}", f"{self.teacher}}}"))

    def runner(self, commit="abc", workers=1):
        return StudyRunner(
            read_study(str(self.folder / "study.yaml")),
            ResultsFile(self.folder / "results.csv"),
            self.folder / "output",
            program=[sys.executable, str(self.folder / "train.py")],
            commit=commit,
            final_files=("annotations/instances_val.json", "images/val"),
            workers=workers,
            poll_seconds=0.02,
        )

    def run(self, **options):
        return self.runner(**options).run()

    def rows(self):
        return read_results(self.folder / "results.csv")

    def keys(self):
        return [(row.arm, row.seed) for row in self.rows()]

    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def trained(self):
        """Arm and seed of each training that was started, in order."""
        return [(Path(c["OUTPUT_DIR"]).parent.name, int(c["SEED"])) for c in self.calls() if "SEED" in c]
