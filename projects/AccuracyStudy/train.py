#!/usr/bin/env python
"""One training of a study: tools/train_net.py with a clock, and with its results in OUTPUT_DIR/result.json.

    python projects/AccuracyStudy/train.py --config-file FILE [--resume | --eval-only] [KEY VALUE ...]

The runner (run.py) starts it. It takes the arguments of tools/train_net.py and trains in one process.
"""

import mgd_det  # noqa: F401  (first: it imports Detectron2 without the warnings of its code)

# isort: split
import argparse
import json
import os
from typing import Any, Dict, List, Optional

import torch
from accuracy_study.clock import StepClock
from accuracy_study.hardware import cpu_name
from accuracy_study.projects import import_project
from detectron2.config import CfgNode
from detectron2.engine import HookBase

from mgd_det.cli.error_reports import run_program
from mgd_det.cli.yaml_setup import argument_parser, setup
from mgd_det.engine import Trainer, load_and_test
from mgd_det.engine.hooks.ema import EMA_PREFIX
from mgd_det.files.atomic_files import write_atomically
from mgd_det.visualization.curves import read_metrics


class TimedTrainer(Trainer):
    """A Trainer with a StepClock, ``clock``."""

    def build_hooks(self) -> List[HookBase]:
        self.clock = StepClock()
        return [self.clock, *super().build_hooks()]


def run(args: argparse.Namespace) -> None:
    """Train or evaluate, and write result.json.

    With SOLVER.EMA, the scores are those of the averaged weights.
    """
    if args.project:
        import_project(args.project)
    cfg = setup(args)
    if args.eval_only:
        write_result(cfg, {"scores": load_and_test(cfg)})
        return
    trainer = TimedTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    scores = trainer._last_eval_results
    scores = scores[EMA_PREFIX] if cfg.SOLVER.EMA.ENABLED else scores
    clock = {"seconds": trainer.clock.seconds, "cpu_seconds": trainer.clock.cpu_seconds}
    curve = evaluation_curve(cfg, scores["bbox"]["AP"])
    write_result(cfg, {"scores": scores, "iterations": trainer.max_iter, **clock, "curve": curve})


def evaluation_curve(cfg: CfgNode, final: float) -> Dict[int, float]:
    """Return AP by the number of iterations after which it was measured, with the final one."""
    name = f"{EMA_PREFIX}/bbox/AP" if cfg.SOLVER.EMA.ENABLED else "bbox/AP"
    iterations, values = read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json")).get(name, ((), ()))
    # Detectron2 counts a periodic evaluation with the iteration before it.
    curve = {iteration + 1: value for iteration, value in zip(map(int, iterations), map(float, values))}
    curve = {iteration: value for iteration, value in curve.items() if iteration < cfg.SOLVER.MAX_ITER}
    return {**curve, cfg.SOLVER.MAX_ITER: final}


def write_result(cfg: CfgNode, result: Dict[str, Any]) -> None:
    """Write result.json, with what it ran on."""
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    hardware = torch.cuda.get_device_name() if on_gpu else cpu_name()
    machine = {"device": "cuda" if on_gpu else "cpu", "hardware": hardware, "torch": torch.__version__}
    text = json.dumps({**result, **machine}, indent=1)
    path = os.path.join(cfg.OUTPUT_DIR, "result.json")
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def main(argv: Optional[List[str]] = None) -> None:
    """Run the program."""
    parser = argument_parser()
    parser.add_argument("--project", default="", metavar="DIR", help="import the package of this project first")
    args = parser.parse_args(argv)
    run_program(lambda: run(args))


if __name__ == "__main__":
    main()
