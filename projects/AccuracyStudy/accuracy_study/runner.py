"""Runs the trainings of a study side by side, and goes on where it stopped."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from accuracy_study.equal_time import SCHEDULE_KEYS, longer_schedule, schedule_of, time_ratio
from accuracy_study.processes import LoggedProcess, stop
from accuracy_study.results import Result, ResultsFile, overrides_list, overrides_of_text, overrides_text
from accuracy_study.study import EVAL_ONLY_SEED, Arm, Study
from accuracy_study.tasks import (
    ConfigFacts,
    Task,
    claim_folder,
    config_facts,
    has_checkpoint,
    read_result,
    row_of_evaluation,
    row_of_training,
)
from mgd_det.engine.hooks.interruption import EXIT_INTERRUPTED
from mgd_det.errors import UserError
from mgd_det.progress import ProgressLog

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 60
_GUESSED_RATIO = 1.5  # of the time of a distilled training, for the time left before it is known


@dataclass(frozen=True)
class Job:
    """A training, and then the final evaluation of its model."""

    arm: Arm
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"


@dataclass
class Running:
    """A process of a job: its training, or (``training`` is its row) its final evaluation."""

    job: Job
    folder: Path
    process: LoggedProcess
    task: Optional[Task] = None
    training: Optional[Result] = None


class StudyRunner:
    """Runs what is missing of a study.

    - A result that the csv has is not run again.
    - A training that was cut continues from its last checkpoint, or starts again if there is none.
    - An arm with ``same_time_as`` starts when the two arms that set its length are done. If the csv has a result of it,
      its length is kept.
    - A training that fails does not stop the others.
    """

    def __init__(
        self,
        study: Study,
        results: ResultsFile,
        output: Path,
        *,
        program: Sequence[str],
        commit: str,
        final_files: Optional[Tuple[str, str]] = None,
        workers: int = 1,
        poll_seconds: float = 1.0,
    ) -> None:
        """
        Args:
            study: what to run.
            results: where the rows go.
            output: folder for the trainings, <output>/<arm>/seed<seed>.
            program: the command of train.py.
            commit: of the code.
            final_files: annotations and images of ``study.final``.
            workers: processes side by side, > 0.
            poll_seconds: time between two looks at the processes.

        Raises:
            UserError: a config has an error, or the csv has results of other trainings under the name of an arm.
        """
        self._study, self._results, self._output = study, results, output
        self._program, self._commit, self._final_files = list(program), commit, final_files
        self._workers, self._poll_seconds = workers, poll_seconds
        self._facts = {
            arm.name: config_facts(arm.config, overrides_list(arm.overrides), arm.eval_only) for arm in study.arms
        }
        self._failures: List[str] = []
        self._waiting: List[Job] = []
        self._running: List[Running] = []
        self._iterations_done = 0
        self._check_results()

    def run(self) -> List[str]:
        """Run it, and return a message for each failure."""
        self._failures, self._running, self._iterations_done = [], [], 0
        self._waiting = [job for job in self._jobs() if not self._is_done(job)]
        progress, shown = ProgressLog(logger, f"Study {self._study.name}: iterations"), time.monotonic()
        logger.info(f"Study {self._study.name}: {len(self._waiting)} of {len(self._jobs())} trainings to run")
        try:
            while self._waiting or self._running:
                self._start_jobs()
                time.sleep(self._poll_seconds)
                self._collect()
                if time.monotonic() - shown >= _SECONDS_BETWEEN_LINES:
                    shown = time.monotonic()
                    self._show_progress(progress)
        finally:
            if self._running:
                logger.info(f"Stopping {len(self._running)} processes; the same command continues the study")
            stop([running.process for running in self._running])
        return self._failures

    # ------------------------------------------------------------------ what there is to do
    def _jobs(self) -> List[Job]:
        # Seed by seed, so that a study that is cut short has pairs. Arms that wait for others come last.
        arms = sorted(self._study.arms, key=lambda arm: arm.same_time_as is not None)
        evaluated = [Job(arm, EVAL_ONLY_SEED) for arm in arms if arm.eval_only]
        own = [arm for arm in arms if arm.same_time_as is None and not arm.eval_only]
        timed = [arm for arm in arms if arm.same_time_as is not None]
        return evaluated + [Job(arm, seed) for group in (own, timed) for seed in self._study.seeds for arm in group]

    def _is_done(self, job: Job) -> bool:
        row = self._row(job)
        final = self._study.final
        return row is not None and (final is None or self._results.find(job.arm.name, job.seed, final.name) is not None)

    def _row(self, job: Job) -> Optional[Result]:
        return self._results.find(job.arm.name, job.seed, self._facts[job.arm.name].evaluation_set)

    def _rows(self, arm: str) -> List[Result]:
        evaluation_set = self._facts[arm].evaluation_set
        return [row for row in self._results.rows if (row.arm, row.evaluation_set) == (arm, evaluation_set)]

    def _check_results(self) -> None:
        for row in self._results.rows:
            if row.study != self._study.name:
                raise UserError(f"results {self._results.path} are of the study {row.study!r}: name another file")
            if row.arm not in self._facts:
                continue  # an arm that the study had, or that this run leaves out
            arm = self._study.arm(row.arm)
            wanted = {"config": arm.config, "teacher": self._facts[arm.name].teacher}
            wanted["overrides"] = overrides_text(arm.overrides)
            found = {key: getattr(row, key) for key in wanted}
            if arm.same_time_as is not None:
                wanted["overrides"], found["overrides"] = map(_without_schedule, (wanted["overrides"], row.overrides))
            for key, value in wanted.items():
                if found[key] != value:
                    raise UserError(
                        f"results {self._results.path} have the arm {arm.name!r} with {key} {found[key]!r}, but the "
                        f"study has {value!r}: rename the arm, or remove its rows to train it again"
                    )

    def _overrides(self, arm: Arm) -> Mapping[str, Any]:
        """Return the overrides of an arm.

        Raises:
            UserError: its length depends on results that are missing.
        """
        if arm.same_time_as is None:
            return arm.overrides
        rows = self._rows(arm.name)
        if rows:
            return {**arm.overrides, **schedule_of(rows[0])}
        assert arm.like is not None
        try:
            ratio = time_ratio(self._rows(arm.like), self._rows(arm.same_time_as))
        except UserError as e:
            raise UserError(f"{arm.name}: {arm.like} and {arm.same_time_as}: {e}") from e
        facts = self._facts[arm.like]
        schedule = longer_schedule(facts.max_iter, facts.steps, ratio)
        logger.info(
            f"{arm.same_time_as} takes {ratio:.3f} times as long as {arm.like}: {arm.name} gets "
            f"{schedule['SOLVER.MAX_ITER']} iterations, steps {schedule['SOLVER.STEPS']}"
        )
        return {**arm.overrides, **schedule}

    def _can_start(self, job: Job) -> bool:
        """Return whether nothing that the length of this training depends on is still to come."""
        arms = (job.arm.like, job.arm.same_time_as)
        others = [*self._waiting, *(running.job for running in self._running)]
        return job.arm.same_time_as is None or not any(other.arm.name in arms for other in others)

    # ------------------------------------------------------------------ processes
    def _start_jobs(self) -> None:
        while len(self._running) < self._workers:
            job = next(filter(self._can_start, self._waiting), None)
            if job is None:
                return
            self._waiting.remove(job)
            try:
                self._start(job)
            except UserError as e:
                self._fail(f"{job}: {e}")

    def _start(self, job: Job) -> None:
        folder = self._output / job.arm.name / f"seed{job.seed}"
        row = self._row(job)
        if row is not None:
            self._start_final_evaluation(job, folder, row)
            return
        overrides = self._overrides(job.arm)
        task = Task(
            job.arm.config, overrides_text(overrides), teacher=self._facts[job.arm.name].teacher, commit=self._commit
        )
        task = claim_folder(folder, task)
        if read_result(folder) is not None:  # of a run that was ended before it read it
            self._add_training(job, folder, task)
            return
        resume = has_checkpoint(folder) and not job.arm.eval_only
        what = "evaluation starts" if job.arm.eval_only else f"training {'continues' if resume else 'starts'}"
        logger.info(f"{job}: {what} in {folder}")
        flags = ["--eval-only"] if job.arm.eval_only else ["--resume"] if resume else []
        command = [*self._program, "--config-file", job.arm.config, *flags]
        command += [*overrides_list(overrides), "SEED", str(job.seed), "OUTPUT_DIR", str(folder)]
        process = LoggedProcess(command, folder / "stdout.txt", append=resume)
        self._running.append(Running(job, folder, process, task=task))

    def _start_final_evaluation(self, job: Job, training_folder: Path, row: Result) -> None:
        assert self._study.final is not None and self._final_files is not None
        folder = training_folder / self._study.final.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        annotations, images = self._final_files
        command = [*self._program, "--config-file", job.arm.config, "--eval-only"]
        command += ["--val-json", annotations, "--val-images", images]
        for key, value in overrides_of_text(row.overrides).items():
            command += [key, value]
        if not job.arm.eval_only:
            command += ["MODEL.WEIGHTS", str(training_folder / self._facts[job.arm.name].weights)]
        command += ["OUTPUT_DIR", str(folder)]
        process = LoggedProcess(command, folder / "stdout.txt")
        self._running.append(Running(job, folder, process, training=row))

    def _collect(self) -> None:
        for running in list(self._running):
            status = running.process.status()
            if status is None:
                continue
            self._running.remove(running)
            what = "final evaluation" if running.training else "evaluation" if running.job.arm.eval_only else "training"
            if status != 0 or not (running.folder / "result.json").exists():
                reason = "was interrupted" if status == EXIT_INTERRUPTED else f"failed with status {status}"
                end = "\n".join(running.process.last_lines())
                self._fail(f"{running.job}: {what} {reason}; the end of {running.process.log}:\n{end}")
                continue
            try:
                self._add(running)
            except (UserError, KeyError, TypeError, ValueError) as e:
                self._fail(f"{running.job}: {what}: {running.folder / 'result.json'}: {e!r}")

    def _add(self, running: Running) -> None:
        if running.training is None:
            assert running.task is not None
            self._add_training(running.job, running.folder, running.task)
            return
        assert self._study.final is not None
        result = read_result(running.folder)
        assert result is not None
        row = row_of_evaluation(running.training, self._study.final.name, result)
        self._results.append(row)
        logger.info(f"{running.job}: {row.AP:.2f} AP on {row.evaluation_set}")

    def _add_training(self, job: Job, folder: Path, task: Task) -> None:
        result = read_result(folder)
        assert result is not None
        facts: ConfigFacts = self._facts[job.arm.name]
        row = row_of_training(self._study.name, job.arm.name, job.seed, facts.evaluation_set, task, result)
        self._results.append(row)
        self._iterations_done += row.iterations
        logger.info(f"{job}: {row.AP:.2f} AP, {row.iterations} iterations in {row.seconds:.0f} s")
        if not self._is_done(job):
            self._waiting.insert(0, job)  # for its final evaluation

    def _fail(self, message: str) -> None:
        logger.error(message)
        self._failures.append(message)

    def _show_progress(self, progress: ProgressLog) -> None:
        done = self._iterations_done
        total = done
        for running in self._running:
            if running.training is None:
                done += running.process.iteration()
                total += self._iterations(running.job.arm)
        total += sum(self._iterations(job.arm) for job in self._waiting if self._row(job) is None)
        if done:
            progress(done, max(total, done))

    def _iterations(self, arm: Arm) -> int:
        if arm.eval_only:
            return 0
        if arm.same_time_as is None:
            return self._facts[arm.name].max_iter
        rows = self._rows(arm.name)
        return rows[0].iterations if rows else round(_GUESSED_RATIO * self._facts[arm.name].max_iter)


def _without_schedule(overrides: str) -> str:
    kept: Dict[str, str] = {k: v for k, v in overrides_of_text(overrides).items() if k not in SCHEDULE_KEYS}
    return overrides_text(kept)
