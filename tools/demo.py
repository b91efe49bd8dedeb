#!/usr/bin/env python
"""The main job on a small scale: what does a light detector gain from distillation?

    python tools/demo.py --output-dir output/demo

Trains four detectors on FashionScenes tiny with tools/train_net.py and the configs of configs/demo/: a ResNet-50
RetinaNet (the teacher), a MobileNetV2 RetinaNet alone, the same one distilled, and the same one alone for as much time
as the distilled one took. The student runs share the initialisation, the order of the data and (except for the last)
the number of iterations. Prints a table and writes it, with pictures of curves, predictions and matching, to the
output folder.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("DETECTRON2_DATASETS", "datasets")

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from tabulate import tabulate

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.cli.error_reports import run_program
from mgd_det.cli.yaml_setup import read_config, use_available_device
from mgd_det.config import without_distillation
from mgd_det.errors import UserError
from mgd_det.files.outputs import writable_folder
from mgd_det.files.unsafe_files import add_unsafe_files_flag
from mgd_det.visualization import draw_predictions, plot_curves

TOOLS = Path(__file__).resolve().parent
TEACHER = "demo/retinanet_R_50_FPN.yaml"
STUDENT = "demo/retinanet_MobileNetV2_FPN.yaml"
DISTILLED = "demo/retinanet_MobileNetV2_FPN_mgd_R50.yaml"


class Run:
    """One training by tools/train_net.py: its command, its log, its results."""

    def __init__(self, name: str, title: str, config: str, output_dir: Path, opts: list) -> None:
        self.name, self.title, self.config, self.output_dir, self.opts = name, title, config, output_dir, opts

    def cfg(self) -> CfgNode:
        """Return the config of the plain detector, with the final weights of the training."""
        cfg = without_distillation(read_config(self.config, self.opts))
        cfg.MODEL.WEIGHTS = str(self.output_dir / "model_final.pth")
        use_available_device(cfg)
        return cfg

    def train(self, step: str) -> None:
        command = [sys.executable, str(TOOLS / "train_net.py"), "--config-file", self.config]
        command += [*self.opts, "OUTPUT_DIR", str(self.output_dir)]
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for stale in self.output_dir.glob("metrics.json"):
            stale.unlink()
        log = self.output_dir / "stdout.txt"
        print(f"\n[{step}] {self.title}\n  $ {' '.join(['python', *command[1:]])}\n  log: {log}", flush=True)
        start = time.perf_counter()
        with open(log, "w") as file:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for line in process.stdout:
                file.write(line)
                self._show_progress(line)
        if process.wait() != 0:
            tail = log.read_text().splitlines()[-15:]
            raise UserError("\n".join([f"the training failed; the end of {log}:", *tail]))
        print(f"  done in {time.perf_counter() - start:.0f} s, AP {self.results()['bbox/AP']:.2f}", flush=True)

    @staticmethod
    def _show_progress(line: str) -> None:
        progress = re.search(r"eta: (\S+)  iter: (\d+)  total_loss: (\S+)", line)
        if progress and (int(progress[2]) + 1) % 20 == 0:
            print(f"  iteration {int(progress[2]) + 1}, loss {progress[3]}, {progress[1]} left", flush=True)
        elif re.search(r"Matching update .* took|Total inference time|Start inference", line):
            print("  " + re.sub(r"^\[.*?\]: ", "", line.strip()).rstrip(":"), flush=True)

    def metrics(self) -> list:
        lines = (self.output_dir / "metrics.json").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def results(self) -> dict:
        return [entry for entry in self.metrics() if "bbox/AP" in entry][-1]

    def iterations(self) -> int:
        return self.metrics()[-1]["iteration"]

    def training_seconds(self) -> float:
        """Return the time of steps and matching updates, without start-up, evaluation and saving."""
        log = (self.output_dir / "stdout.txt").read_text()
        seconds_per_step = float(re.search(r"Overall training speed: .*\(([\d.]+) s / it\)", log)[1])
        updates = sum(float(x) for x in re.findall(r"Matching update at iteration \d+ took ([\d.]+) s", log))
        return seconds_per_step * self.cfg().SOLVER.MAX_ITER + updates


def demo(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    output = Path(writable_folder(args.output_dir, "--output-dir"))
    print("[1/6] FashionScenes tiny", flush=True)
    run_tool("prepare_fashion_scenes.py", "tiny")

    common = args.opts
    teacher = Run("teacher", "teacher: RetinaNet R50 of half the width", TEACHER, output / "teacher", common)
    student = Run("student alone", "student alone: RetinaNet MobileNetV2", STUDENT, output / "student", common)
    weights = ["MODEL.MGD.TEACHER.WEIGHTS", str(teacher.output_dir / "model_final.pth")]
    distilled = Run(
        "student distilled", "student distilled by the teacher", DISTILLED, output / "distilled", [*common, *weights]
    )
    teacher.train("2/6")
    student.train("3/6")
    distilled.train("4/6")
    as_long = Run(
        "student alone, same time",
        "student alone, for as much time as the distilled one took",
        STUDENT,
        output / "student_same_time",
        [*common, *longer_schedule(student, distilled)],
    )
    as_long.train("5/6")

    print("\n[6/6] Table and pictures", flush=True)
    runs = [teacher, student, distilled, as_long]
    table = results_table(runs)
    summary = (
        f"FashionScenes tiny, {torch.get_num_threads()} threads, torch {torch.__version__}; trained from scratch, "
        f"seed {student.cfg().SEED}; one run each.\n{table}\n"
    )
    (output / "results.md").write_text(summary)
    plot_curves(
        {run.name: run.output_dir / "metrics.json" for run in runs}, output / "curves.png", title="The demo's four runs"
    )
    picture_predictions(runs, output / "predictions.png")
    matching = ["--output-dir", str(output / "matching"), "--batches", "5"]
    matching += ["--checkpoint", str(distilled.output_dir / "model_final.pth")]
    run_tool("visualize_matching.py", "--config-file", DISTILLED, *matching, *distilled.opts)
    print(f"\n{summary}\nTables and pictures are in {output}/:")
    for path in [output / "results.md", *sorted(output.glob("*.png")), *sorted((output / "matching").glob("*.png"))]:
        print(f"  {path}")
    print(f"All of it took {(time.perf_counter() - started) / 60:.1f} minutes.")


def run_tool(name: str, *argv: str) -> None:
    """Run a program of tools/, which prints its own errors."""
    status = subprocess.run([sys.executable, str(TOOLS / name), *argv]).returncode
    if status:
        sys.exit(status)


def longer_schedule(plain: Run, distilled: Run) -> list:
    """Return overrides that train ``plain`` for the time of ``distilled``, with its schedule in proportion."""
    scale = distilled.training_seconds() / plain.training_seconds()
    solver = plain.cfg().SOLVER
    overrides = {
        "SOLVER.MAX_ITER": round(solver.MAX_ITER * scale),
        "SOLVER.STEPS": tuple(round(step * scale) for step in solver.STEPS),
        "TEST.EVAL_PERIOD": round(plain.cfg().TEST.EVAL_PERIOD * scale),
    }
    return [str(item) for pair in overrides.items() for item in pair]


def results_table(runs: list) -> str:
    speeds = milliseconds_per_image(runs)
    rows = []
    for run, speed in zip(runs, speeds):
        results = run.results()
        parameters = sum(p.numel() for p in load(run).parameters()) / 1e6
        scores = [f"{results[f'bbox/{name}']:.2f}" for name in ("AP", "AP50", "AP75")]
        rows.append(
            [run.title, run.cfg().SOLVER.MAX_ITER, f"{run.training_seconds():.0f}", *scores]
            + [f"{parameters:.1f}", f"{speed:.1f}"]
        )
    headers = ["detector", "iterations", "training s", "AP", "AP50", "AP75", "parameters (M)", "ms per image"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def load(run: Run) -> torch.nn.Module:
    cfg = run.cfg()
    model = build_model(cfg).eval()
    WeightsCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


@torch.no_grad()
def milliseconds_per_image(runs: list, images: int = 30) -> list:
    """Return the median time for one image at a time; the detectors take turns."""
    models = [load(run) for run in runs]
    cfg = runs[0].cfg()
    batches = [batch for batch, _ in zip(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]), range(images))]
    seconds: list = [[] for _ in models]
    for batch in batches:
        for model, times in zip(models, seconds):
            start = time.perf_counter()
            model(batch)
            times.append(time.perf_counter() - start)
    return [1000 * float(torch.tensor(times[3:]).median()) for times in seconds]


@torch.no_grad()
def picture_predictions(runs: list, path: Path, images: int = 5) -> None:
    """Draw the predictions for the first validation images."""
    dataset = runs[0].cfg().DATASETS.TEST[0]
    truths = DatasetCatalog.get(dataset)[:images]
    columns = {"ground truth": [truth["annotations"] for truth in truths]}
    for run in runs[:3]:
        model = load(run)
        batches = [batch for batch, _ in zip(build_detection_test_loader(run.cfg(), dataset), range(images))]
        columns[run.name] = [model(batch)[0]["instances"].to("cpu") for batch in batches]
    pictures = [read_image(truth["file_name"], format="RGB") for truth in truths]
    draw_predictions(columns, pictures, MetadataCatalog.get(dataset).thing_classes, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="output/demo", metavar="DIR")
    add_unsafe_files_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides for all runs: KEY VALUE ...")
    arguments = parser.parse_args()
    run_program(lambda: demo(arguments))
