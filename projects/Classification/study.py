#!/usr/bin/env python
"""Runs a study of classifiers on Fashion-MNIST: trainings one after another, with their results in a csv.

    python projects/Classification/study.py projects/Classification/studies/fashion_MobileNetV2.yaml --results my.csv

Run it in the folder of the checkout. Without --results, it adds to the committed csv. The teacher is trained first if
it is not there. The same command continues a study that was stopped: a training that the csv has is not run again.
Studies may run side by side.

An arm without labels (MoCo-v2) is followed by the linear evaluation that the study names, which gives its score.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any, List, Optional

os.environ.setdefault("DETECTRON2_DATASETS", "datasets")
PROJECT = Path(__file__).resolve().parent
sys.path.append(str(PROJECT.parent / "AccuracyStudy"))  # its statistics, its csv and its study files

import torch  # noqa: E402
from accuracy_study.hardware import cpu_name  # noqa: E402
from accuracy_study.results import ResultsFile, overrides_text  # noqa: E402
from accuracy_study.study import Arm, Study, read_study  # noqa: E402
from accuracy_study.tasks import commit_of, teacher_fingerprint  # noqa: E402
from classification.results import Accuracy  # noqa: E402
from classification.training import is_unsupervised, overridden, train_once  # noqa: E402
from detectron2.config import LazyConfig  # noqa: E402
from iopath.common.file_io import file_lock  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from mgd_det.cli.error_reports import program  # noqa: E402
from mgd_det.engine.lazy_config import is_distilled  # noqa: E402
from mgd_det.errors import UserError, did_you_mean  # noqa: E402
from mgd_det.files.folder_lock import lock_folder  # noqa: E402

ROOT = PROJECT.parents[1]
TEACHER_CONFIG = "projects/Classification/configs/fashion/R50.py"
TEACHER, TEACHER_SEED = "teacher", 0
_FINAL, _CONFIG = "model_final.pth", "config.txt"

logger = logging.getLogger("classification")


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", metavar="FILE", help="such as projects/Classification/studies/fashion_MobileNetV2.yaml"
    )
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds")
    parser.add_argument(
        "--teacher-config", metavar="FILE", help=f"default: the study's, and without one {TEACHER_CONFIG}"
    )
    parser.add_argument(
        "--output-dir", default="output/classification/study", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--results", metavar="FILE", help="the csv; default: results/<study>.csv beside this program")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run what is missing of the study of the command line."""
    logging.basicConfig(level=logging.WARNING)
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)  # a training costs one core; two studies side by side use two
    study = read_study(args.study)
    arms = _chosen("--arms", args.arms, [arm.name for arm in study.arms])
    seeds = _chosen("--seeds", args.seeds, list(study.seeds))
    output = Path(args.output_dir)
    lock_folder(str(output / study.name), "--output-dir")
    path = Path(args.results) if args.results else PROJECT / "results" / f"{study.name}.csv"
    teacher = args.teacher_config or study.teacher or TEACHER_CONFIG
    runner = Runner(study, ResultsFile(path, Accuracy), output, teacher)
    for seed in seeds:  # seed by seed, so that a study that is cut short has pairs
        for arm in study.arms:
            if arm.name in arms:
                runner.run(arm, seed)
    logger.info(f"Study {study.name} is complete: {path}")


class Runner:
    """Trains one arm with one seed at a time."""

    def __init__(self, study: Study, results: ResultsFile[Accuracy], output: Path, teacher_config: str) -> None:
        """
        Args:
            study: what is trained.
            results: where the rows go.
            output: folder of the trainings, <output>/<study>/<arm>/seed<seed>; the teacher's is <output>/teacher, or
                <output>/teacher_<config> for another config than R50.py.
            teacher_config: LazyConfig of the teacher. An arm whose train.init_checkpoint is what this config writes
                starts with the teacher's weights.

        Raises:
            UserError: the csv has rows of another study, or of other trainings under the name of an arm.
        """
        self._study, self._results, self._output = study, results, output
        self._commit = commit_of(ROOT)
        for row in results.rows:
            arm = next((arm for arm in study.arms if arm.name == row.arm), None)
            wanted = None if arm is None else (arm.config, overrides_text(arm.overrides))
            if row.study != study.name or wanted not in (None, (row.config, row.overrides)):
                raise UserError(
                    f"results {results.path} have the arm {row.arm!r} of the study {row.study!r} with {row.config} "
                    f"{row.overrides}, but the study file has {wanted}: rename the arm, or remove its rows"
                )
        cfg = overridden(teacher_config, {})
        self._teacher_checkpoint = f"{cfg.train.output_dir}/{_FINAL}"  # as a config of this project names it
        self._teacher = self._trained_teacher(cfg, teacher_config)
        self._fingerprint = teacher_fingerprint(str(self._teacher))
        for row in results.rows:
            if row.teacher not in ("", self._fingerprint):
                raise UserError(
                    f"results {results.path} have the arm {row.arm!r} with the teacher {row.teacher}, but "
                    f"{self._teacher} is {self._fingerprint}: name another --results, or remove the rows"
                )

    def run(self, arm: Arm, seed: int) -> None:
        """Train an arm with a seed, and add its row, unless the csv has it."""
        cfg = overridden(arm.config, arm.overrides)
        linear = self._linear_evaluation(arm) if is_unsupervised(cfg) else None
        images = _evaluation_set(linear or cfg)
        if self._results.find(arm.name, seed, images) is not None:
            return
        distilled = is_distilled(cfg)
        is_teacher = cfg.train.init_checkpoint == self._teacher_checkpoint
        if distilled:
            cfg.model.backbone.teacher.weights = str(self._teacher)
        if is_teacher:
            cfg.train.init_checkpoint = str(self._teacher)
        scores = train_once(cfg, seed, self._output / self._study.name / arm.name / f"seed{seed}", linear)
        row = Accuracy(
            study=self._study.name,
            arm=arm.name,
            seed=seed,
            config=arm.config,
            overrides=overrides_text(arm.overrides),
            evaluation_set=images,
            iterations=cfg.train.max_iter + (linear.train.max_iter if linear else 0),
            teacher=self._fingerprint if distilled or is_teacher else "",
            commit=self._commit,
            torch=torch.__version__,
            hardware=cpu_name(),
            **scores,
        )
        self._results.append(row)
        logger.info(f"{arm.name}, seed {seed}: {row.top1:.2f} % top-1 accuracy, {row.cpu_seconds:.0f} CPU seconds")

    def _linear_evaluation(self, arm: Arm) -> DictConfig:
        if not self._study.linear:
            raise UserError(
                f"arm {arm.name!r} of the study {self._study.name!r}: {arm.config} has no dataloader.evaluator to give "
                "a score: name the config of a linear evaluation as linear, at the top of the study file"
            )
        return overridden(self._study.linear, {})

    def _trained_teacher(self, cfg: DictConfig, config: str) -> Path:
        folder = self._output / (TEACHER if config == TEACHER_CONFIG else f"{TEACHER}_{Path(config).stem}")
        weights, record, text = folder / _FINAL, folder / _CONFIG, LazyConfig.to_py(cfg)
        known = sorted({row.teacher for row in self._results.rows} - {""})
        with file_lock(str(folder)):  # a study that starts beside this one waits for the teacher
            if weights.exists():
                if record.exists() and record.read_text() != text:
                    raise UserError(
                        f"the teacher in {folder} was trained with another {config} ({record.name} has it): name "
                        "another --output-dir, or delete the folder to train it again"
                    )
                return weights
            if known:
                raise UserError(
                    f"results {self._results.path} are of the teacher {', '.join(known)}, which is not in {folder}: to "
                    "train a teacher and repeat the study, name another --results"
                )
            logger.info(f"The teacher, {config}, is trained in {folder}")
            train_once(cfg, TEACHER_SEED, folder)
            record.write_text(text)
        return weights


def _evaluation_set(cfg: Any) -> str:
    """Return what the images are called that score: "fashion_mnist_test_2000"."""
    dataset = cfg.dataloader.test.dataset
    return f"{dataset._target_.__name__}_{dataset.split}_{dataset.get('images', 0) or 'all'}"


def _chosen(flag: str, given: Optional[List[Any]], known: List[Any]) -> List[Any]:
    for value in given or ():
        if value not in known:
            hint = did_you_mean(str(value), [str(name) for name in known])
            raise UserError(f"{flag} {value!r} is not in the study.{hint} It has {known}")
    return given or known


if __name__ == "__main__":
    program(parse_args, run)()
