"""What a training of a study is made from, and what it leaves in its folder."""

import hashlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from accuracy_study.results import Result
from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import MGD_BACKBONE
from mgd_det.engine.hooks.ema import EMA_CHECKPOINT
from mgd_det.errors import UserError
from mgd_det.files.atomic_files import write_atomically
from mgd_det.files.student_files import STUDENT_WEIGHTS

_CHECKPOINT = "last_checkpoint"  # Detectron2's name of the file that names the newest checkpoint


@dataclass(frozen=True)
class Task:
    """A training, as task.json in its folder has it: its results are those of exactly this.

    Attributes:
        config, overrides, teacher, commit: as in :class:`accuracy_study.results.Result`.
    """

    config: str
    overrides: str
    teacher: str
    commit: str


def claim_folder(folder: Path, task: Task) -> Task:
    """Make a folder ready for a task, and return the task whose training it holds.

    A finished training of the same task stays, also one of another commit. An unfinished one stays if it is of the same
    commit: --resume then continues it. Anything else is trained from the start, without its old results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        saved: Optional[Task] = Task(**json.loads((folder / "task.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        saved = None
    is_done = (folder / "result.json").exists()
    if saved is not None and (saved == task or (is_done and _same_but_commit(saved, task))):
        return saved
    for name in (_CHECKPOINT, "result.json", "metrics.json"):
        (folder / name).unlink(missing_ok=True)
    text = json.dumps(asdict(task), indent=1)
    write_atomically(str(folder / "task.json"), lambda file: file.write(text.encode("utf-8")))
    return task


def _same_but_commit(one: Task, other: Task) -> bool:
    return {**asdict(one), "commit": ""} == {**asdict(other), "commit": ""}


def has_checkpoint(folder: Path) -> bool:
    """Return whether a training in this folder can be resumed."""
    return (folder / _CHECKPOINT).exists()


def read_result(folder: Path) -> Optional[Dict[str, Any]]:
    """Return the content of result.json, or None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}; remove it to train again") from e


def row_of_training(study: str, arm: str, seed: int, evaluation_set: str, task: Task, result: Mapping) -> Result:
    """Return the row of a training, or of an arm with eval_only, and its own evaluation set."""
    result = {"iterations": 0, "seconds": 0.0, "cpu_seconds": 0.0, "curve": {}, **result}
    iterations = result["iterations"]
    return Result(
        study=study,
        arm=arm,
        seed=seed,
        config=task.config,
        overrides=task.overrides,
        evaluation_set=evaluation_set,
        **_scores(result),
        iterations=iterations,
        seconds=result["seconds"],
        cpu_seconds=result["cpu_seconds"],
        seconds_per_iteration=result["seconds"] / max(iterations, 1),
        cpu_seconds_per_iteration=result["cpu_seconds"] / max(iterations, 1),
        curve=" ".join(f"{iteration}:{ap:.2f}" for iteration, ap in result["curve"].items()),
        teacher=task.teacher,
        commit=task.commit,
        torch=result["torch"],
        device=result["device"],
        hardware=result["hardware"],
    )


def row_of_evaluation(training: Result, evaluation_set: str, result: Mapping) -> Result:
    """Return the row of another evaluation of a trained model, with what the training cost."""
    return Result(**{**asdict(training), **_scores(result), "evaluation_set": evaluation_set, "curve": ""})


def _scores(result: Mapping) -> Dict[str, Any]:
    boxes, masks = result["scores"]["bbox"], result["scores"].get("segm")
    scores = {name: boxes[name] for name in ("AP", "AP50", "AP75")}
    return {**scores, "mask_AP": None if masks is None else masks["AP"]}


@dataclass(frozen=True)
class ConfigFacts:
    """What a study needs to know of a config.

    Attributes:
        evaluation_set: the set of DATASETS.TEST.
        teacher: see :class:`accuracy_study.results.Result`.
        max_iter, steps: of the schedule.
        weights: name of the file of weights that a training leaves to be scored.
    """

    evaluation_set: str
    teacher: str
    max_iter: int
    steps: tuple
    weights: str


def config_facts(config: str, overrides: list, eval_only: bool = False) -> ConfigFacts:
    """Read a config with its overrides.

    Raises:
        UserError: the config has an error, or evaluates on another number of sets than one; or it is of an arm with
            eval_only, and names no weights.
    """
    cfg = read_config(config, overrides)
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(f"config {config}: DATASETS.TEST is {cfg.DATASETS.TEST}; a study needs one set to evaluate on")
    teacher = ""
    if eval_only:
        if not cfg.MODEL.WEIGHTS:
            raise UserError(f"config {config}: eval_only evaluates MODEL.WEIGHTS, which is empty: set it")
        teacher = teacher_fingerprint(cfg.MODEL.WEIGHTS)
    elif cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE or cfg.MODEL.MGD.INHERIT:
        node = cfg.MODEL.MGD.TEACHER
        teacher = teacher_fingerprint(node.WEIGHTS or node.CONFIG_FILE)
    weights = f"{EMA_CHECKPOINT}.pth" if cfg.SOLVER.EMA.ENABLED else STUDENT_WEIGHTS
    return ConfigFacts(cfg.DATASETS.TEST[0], teacher, cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS), weights)


def teacher_fingerprint(weights: str) -> str:
    """Return the first 12 digits of a file's SHA-256; weights that are no local file keep their name."""
    if not os.path.isfile(weights):
        return weights
    digest = hashlib.sha256()
    with open(weights, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()[:12]


def commit_of(root: Path) -> str:
    """Return the commit of the checkout, with "+" if code or configs differ from it; "" without a repository or git."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    # Not the results, which change while a study runs.
    code = ("mgd_det", "configs", "tools", "projects", ":(exclude)projects/*/results/*")
    changed = git("status", "--porcelain", "--", *code)
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
