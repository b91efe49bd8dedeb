#!/usr/bin/env python
"""The main job on a small scale: what does a light detector gain from distillation?

    python tools/demo.py --output-dir output/demo

Trains a MobileNetV2 RetinaNet on FashionScenes small three times, with tools/train_net.py and the configs of
configs/demo/: alone, distilled by the recommended recipe, and alone for as much time as the distilled one took. They
share the initialisation, the order of the data and (except for the last) the number of iterations.

The teacher, a ResNet-50 RetinaNet, comes trained with the project. --train-teacher makes its file again.

Prints a table and writes it, with pictures of curves, predictions and (where the recipe has one) the channel matching,
to the output folder.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

os.environ.setdefault("DETECTRON2_DATASETS", "datasets")

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from safetensors import safe_open
from tabulate import tabulate

from mgd_det.checkpoint import WeightsCheckpointer, write_half_precision
from mgd_det.checkpoint.safe_loading import load_torch_file
from mgd_det.cli.error_reports import run_program
from mgd_det.cli.yaml_setup import read_config, use_available_device
from mgd_det.config import without_distillation
from mgd_det.errors import UserError
from mgd_det.files.outputs import writable_folder
from mgd_det.files.unsafe_files import add_unsafe_files_flag
from mgd_det.visualization import draw_predictions, plot_curves

TOOLS = Path(__file__).resolve().parent
TEACHER = "demo/retinanet_R_50_FPN.yaml"
TEACHER_TITLE = "teacher: RetinaNet R50 of half the width"
TEACHER_WEIGHTS = TOOLS.parent / "configs" / "demo" / "retinanet_R_50_FPN.safetensors"
STUDENT = "demo/retinanet_MobileNetV2_FPN.yaml"
DISTILLED = "demo/retinanet_MobileNetV2_FPN_mgd_R50.yaml"


class Run:
    """One detector of the demo: the command of tools/train_net.py that trains or evaluates it, its log, its results."""

    def __init__(self, name: str, title: str, config: str, output_dir: Path, opts: list) -> None:
        self.name, self.title, self.config, self.output_dir, self.opts = name, title, config, output_dir, opts

    def cfg(self) -> CfgNode:
        """Return the config of the plain detector, with the final weights of the training."""
        cfg = without_distillation(read_config(self.config, self.opts))
        cfg.MODEL.WEIGHTS = self.weights()
        use_available_device(cfg)
        return cfg

    def weights(self) -> str:
        """Return the final weights."""
        return str(self.output_dir / "model_final.pth")

    def run(self, step: str, threads: Optional[int] = None) -> None:
        """Run the command, and show its progress.

        Args:
            step: of the demo, "2/4".
            threads: of the process; None for as many as there are cores.

        Raises:
            UserError: it failed.
        """
        command = self.command()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for stale in self.output_dir.glob("metrics.json"):
            stale.unlink()
        log = self.output_dir / "stdout.txt"
        print(f"\n[{step}] {self.title}\n  $ {' '.join(['python', *command[1:]])}\n  log: {log}", flush=True)
        start = time.perf_counter()
        environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
            for line in process.stdout:
                file.write(line)
                self._show_progress(line)
        if process.wait() != 0:
            tail = log.read_text().splitlines()[-15:]
            raise UserError("\n".join([f"{self.name} failed; the end of {log}:", *tail]))
        seconds = time.perf_counter() - start
        print(f"  {self.name}: done in {seconds:.0f} s, AP {self.results()['AP']:.2f}", flush=True)

    def command(self) -> list:
        command = [sys.executable, str(TOOLS / "train_net.py"), "--config-file", self.config]
        return [*command, *self.opts, "OUTPUT_DIR", str(self.output_dir)]

    def _show_progress(self, line: str) -> None:
        progress = re.search(r"eta: (\S+)  iter: (\d+)  total_loss: (\S+)", line)
        if progress and (int(progress[2]) + 1) % 20 == 0:
            print(
                f"  {self.name}: iteration {int(progress[2]) + 1}, loss {progress[3]}, {progress[1]} left", flush=True
            )
        elif re.search(r"Matching update .* took|Total inference time|Start inference", line):
            print(f"  {self.name}: " + re.sub(r"^\[.*?\]: ", "", line.strip()).rstrip(":"), flush=True)

    def log(self) -> str:
        return (self.output_dir / "stdout.txt").read_text()

    def results(self) -> dict:
        """Return the scores of the last evaluation: AP, AP50..."""
        names, values = re.findall(r"copypaste: (AP,.*|[\d.,nan]+)$", self.log(), re.MULTILINE)[-2:]
        return dict(zip(names.split(","), map(float, values.split(","))))

    def iterations(self) -> str:
        return str(self.cfg().SOLVER.MAX_ITER)

    def training_seconds(self) -> float:
        """Return the time of steps and matching updates, without start-up, evaluation and saving."""
        log = self.log()
        seconds_per_step = float(re.search(r"Overall training speed: .*\(([\d.]+) s / it\)", log)[1])
        updates = sum(float(x) for x in re.findall(r"Matching update at iteration \d+ took ([\d.]+) s", log))
        return seconds_per_step * self.cfg().SOLVER.MAX_ITER + updates

    def shown_seconds(self) -> str:
        return f"{self.training_seconds():.0f}"


class TrainedTeacher(Run):
    """The teacher whose weights are there already: it is evaluated only."""

    def __init__(self, weights: Path, output_dir: Path, opts: list) -> None:
        super().__init__("teacher", TEACHER_TITLE, TEACHER, output_dir, opts)
        self._weights = weights

    def weights(self) -> str:
        return str(self._weights)

    def command(self) -> list:
        command = super().command()
        return [*command[:4], "--eval-only", *command[4:], "MODEL.WEIGHTS", self.weights()]

    def iterations(self) -> str:
        with safe_open(self.weights(), "pt") as file:
            return (file.metadata() or {}).get("iterations", "-")

    def shown_seconds(self) -> str:
        return "-"


def demo(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    output = Path(writable_folder(args.output_dir, "--output-dir"))
    common, weights = args.opts, Path(args.teacher)
    if not args.train_teacher and not weights.is_file():
        raise UserError(
            f"--teacher {weights} does not exist: give the teacher's weights, or --train-teacher to make them"
        )
    print("[1/4] FashionScenes small", flush=True)
    run_tool("prepare_fashion_scenes.py", "small")
    if args.train_teacher:
        train_teacher(weights, output / "teacher_training", common)

    teacher = TrainedTeacher(weights, output / "teacher", common)
    student = Run("student alone", "student alone: RetinaNet MobileNetV2", STUDENT, output / "student", common)
    distilled = Run(
        "student distilled",
        "student distilled by the teacher",
        DISTILLED,
        output / "distilled",
        [*common, "MODEL.MGD.TEACHER.WEIGHTS", str(weights)],
    )
    run_side_by_side("2/4", [student, distilled])
    as_long = Run(
        "student alone, same time",
        "student alone, for as much time as the distilled one took",
        STUDENT,
        output / "student_same_time",
        [*common, *longer_schedule(student, distilled)],
    )
    run_side_by_side("3/4", [as_long, teacher])

    print("\n[4/4] Table and pictures", flush=True)
    runs = [teacher, student, distilled, as_long]
    summary = (
        f"FashionScenes small, torch {torch.__version__}; students trained from scratch with one thread each, "
        f"seed {student.cfg().SEED}; one run each.\n{results_table(runs)}\n"
    )
    (output / "results.md").write_text(summary)
    plot_curves(
        {run.name: run.output_dir / "metrics.json" for run in runs[1:]},
        output / "curves.png",
        title=f"The demo's three students (teacher: {teacher.results()['AP']:.1f} AP)",
    )
    picture_predictions(runs, output / "predictions.png")
    draw_matching(distilled, output / "matching")
    print(f"\n{summary}\nTables and pictures are in {output}/:")
    for path in [output / "results.md", *sorted(output.glob("*.png")), *sorted((output / "matching").glob("*.png"))]:
        print(f"  {path}")
    print(f"All of it took {(time.perf_counter() - started) / 60:.1f} minutes.")


def run_side_by_side(step: str, runs: list) -> None:
    """Run the commands of ``runs`` side by side, with one thread each.

    A second thread makes a step of these small detectors hardly faster. On one core they run one after the other.
    """
    with ThreadPoolExecutor(min(len(runs), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda run: run.run(step, threads=1), runs))


def train_teacher(weights: Path, folder: Path, opts: list) -> None:
    """Train the teacher, and write its weights in float16."""
    run = Run("teacher", TEACHER_TITLE, TEACHER, folder, opts)
    run.run("1/4")
    write_teacher(Path(run.weights()), weights, run.results()["AP"], run.cfg().SOLVER.MAX_ITER)


def write_teacher(checkpoint: Path, weights: Path, ap: float, iterations: int) -> None:
    """Write the weights of a trained teacher in float16, with what they are in the file's metadata.

    Args:
        checkpoint: the model_final.pth of a training with the config TEACHER.
        weights: the .safetensors file to write.
        ap: of its last evaluation, in float32.
        iterations: that it was trained.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TOOLS, capture_output=True, text=True).stdout.strip()
    metadata = {"config": f"configs/{TEACHER}", "AP": f"{ap:.2f}", "iterations": str(iterations), "commit": commit}
    write_half_precision(str(weights), load_torch_file(str(checkpoint))["model"], metadata)
    print(f"  {weights}: {weights.stat().st_size / 1e6:.1f} MB, {metadata}", flush=True)


def draw_matching(distilled: Run, folder: Path) -> None:
    """Draw the channel matching, if the recipe has one. FPN levels of equal width learn channel i from channel i."""
    if "Matching update at" not in distilled.log():
        return
    matching = ["--output-dir", str(folder), "--batches", "5", "--checkpoint", distilled.weights()]
    run_tool("visualize_matching.py", "--config-file", DISTILLED, *matching, *distilled.opts)


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
        scores = [f"{results[name]:.2f}" for name in ("AP", "AP50", "AP75")]
        rows.append([run.title, run.iterations(), run.shown_seconds(), *scores, f"{parameters:.1f}", f"{speed:.1f}"])
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
    parser.add_argument(
        "--teacher", default=str(TEACHER_WEIGHTS), metavar="FILE", help="the teacher's weights (.safetensors)"
    )
    parser.add_argument(
        "--train-teacher", action="store_true", help="train the teacher first, about half an hour, and write --teacher"
    )
    add_unsafe_files_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides for all runs: KEY VALUE ...")
    arguments = parser.parse_args()
    run_program(lambda: demo(arguments))
