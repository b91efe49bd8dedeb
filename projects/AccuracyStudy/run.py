#!/usr/bin/env python
"""Runs a study: many trainings side by side, with their results in a csv.

    python projects/AccuracyStudy/run.py projects/AccuracyStudy/studies/recipe.yaml --workers 2

Run it in the folder of the checkout. The same command continues a study that was stopped: results that the csv has are
not run again, and a training that was cut continues from its last checkpoint. The exit status is 1 if a training
failed; the others are not affected.
"""

import argparse
import dataclasses
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Optional

os.environ.setdefault("DETECTRON2_DATASETS", "datasets")

from accuracy_study.projects import import_project
from accuracy_study.results import ResultsFile
from accuracy_study.runner import StudyRunner
from accuracy_study.study import Study, read_study
from accuracy_study.tasks import commit_of

from mgd_det.cli.arguments import positive
from mgd_det.cli.error_reports import program
from mgd_det.errors import UserError, did_you_mean
from mgd_det.files.folder_lock import lock_folder

PROJECT = Path(__file__).resolve().parent
ROOT = PROJECT.parents[1]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", metavar="FILE", help="a study, such as projects/AccuracyStudy/studies/recipe.yaml")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="trainings side by side")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds")
    parser.add_argument("--output-dir", default="output/study", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--results", metavar="FILE", help="the csv; default: results/<study>.csv in the folder of this program"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run the study of the command line."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, _interrupt)
    study = selected(read_study(args.study), args.arms, args.seeds)
    for key in ("teacher", "linear"):
        if getattr(study, key):
            raise UserError(
                f"study {args.study} has {key}: {getattr(study, key)}, which only projects/Classification/study.py "
                "reads: run it by that program, or leave the key out"
            )
    program = [sys.executable, str(PROJECT / "train.py")]
    if study.project:
        import_project(study.project)  # the runner reads the configs
        program += ["--project", study.project]
    output = Path(args.output_dir) / study.name
    lock_folder(str(output), "--output-dir")
    results = ResultsFile(Path(args.results) if args.results else PROJECT / "results" / f"{study.name}.csv")
    datasets = os.environ["DETECTRON2_DATASETS"]
    runner = StudyRunner(
        study,
        results,
        output,
        program=program,
        commit=commit_of(ROOT),
        final_files=study.final.files(datasets) if study.final else None,
        workers=args.workers,
    )
    prepare_scenes(study, datasets)
    failures = runner.run()
    if failures:
        names = "\n".join(failure.partition(";")[0] for failure in failures)
        raise UserError(f"{len(failures)} failed:\n{names}\nRun the same command again to repeat them.")
    logging.info(f"Study {study.name} is complete: {results.path}")


def selected(study: Study, arms: Optional[List[str]], seeds: Optional[List[int]]) -> Study:
    """Return the study with only the arms and seeds that were asked for, and the arms that these refer to.

    Raises:
        UserError: the study has no such arm or seed.
    """
    known = [arm.name for arm in study.arms]
    for name in arms or ():
        if name not in known:
            raise UserError(f"--arms {name!r} is not an arm of the study.{did_you_mean(name, known)} It has {known}")
    for seed in seeds or ():
        if seed not in study.seeds:
            raise UserError(f"--seeds {seed} is not a seed of the study, which has {list(study.seeds)}")
    wanted = set(arms or known)
    for arm in study.arms:
        if arm.name in wanted and arm.same_time_as is not None:
            wanted.update(name for name in (arm.like, arm.same_time_as) if name)
    chosen = tuple(arm for arm in study.arms if arm.name in wanted)
    return dataclasses.replace(study, arms=chosen, seeds=tuple(seeds or study.seeds))


def prepare_scenes(study: Study, datasets: str) -> None:
    """Make the scenes that the study needs; those that are there and complete stay."""
    tool = [sys.executable, str(ROOT / "tools" / "prepare_fashion_scenes.py")]
    commands = [[*tool, *study.fashion_scenes, "--root", datasets]] if study.fashion_scenes else []
    if study.final is not None:
        final = study.final
        numbers = ["--seed", str(final.seed), "--train", "1", "--val", str(final.images)]
        commands.append([*tool, final.size, *numbers, "--root", final.root(datasets)])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise UserError(f"the scenes could not be made: {' '.join(command)}\n{done.stderr.strip()}")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    program(parse_args, run)()
