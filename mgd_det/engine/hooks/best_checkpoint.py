"""The hook that keeps the weights of the best evaluation."""

import logging
from typing import List, Optional

from detectron2.engine import hooks

from mgd_det.checkpoint.training_checkpointer import CheckpointWriteError, TrainingCheckpointer
from mgd_det.engine.hooks.ema import EMA_PREFIX, EMAHook
from mgd_det.errors import ArgumentError, UserError, did_you_mean

logger = logging.getLogger(__name__)

BEST_CHECKPOINT = "model_best"  # its name without ".pth"


class BestCheckpoint(hooks.BestCheckpointer):
    """Saves the weights as model_best.pth whenever a score is higher than all before, with these differences from
    Detectron2's hook:

    - The file has weights, score and iteration, and no state of the training: --resume never continues from it.
    - A resumed training knows the best score: it is the file's, if its steps were done before the resume. If the file
      is of later steps, which the training will do again, the next evaluation replaces it.
    - With a score of the averaged weights ("ema/bbox/AP"), these are saved.
    - A score that the evaluation does not have ends the training at the first evaluation.
    - If the file cannot be written, an error is logged and training continues; at the end it is a UserError.

    Register it on every rank, after the evaluation.
    """

    def __init__(
        self, checkpointer: TrainingCheckpointer, period: int, ema: Optional[EMAHook] = None, *, metric: str
    ) -> None:
        """
        Args:
            checkpointer: the training's.
            period: that of the evaluation.
            ema: the training's average of weights; None for none.
            metric: name of the score, as the log has it: "bbox/AP"; higher is better.

        Raises:
            ArgumentError: ``metric`` cannot be such a name, or needs ``ema``.
        """
        if not isinstance(metric, str) or "/" not in metric:
            raise ArgumentError("metric", f"is {metric!r}; give a score as metrics.json names it, such as bbox/AP")
        self._is_of_average = metric.startswith(f"{EMA_PREFIX}/")
        if self._is_of_average and ema is None:
            raise ArgumentError(
                "metric",
                f"is {metric!r}, a score of averaged weights, but there is no average: set SOLVER.EMA.ENABLED True "
                f"(train.ema), or use {metric.partition('/')[2]!r}",
            )
        super().__init__(period, checkpointer, metric, file_prefix=BEST_CHECKPOINT)
        self._ema = ema

    def before_train(self) -> None:
        self.best_metric = self.best_iter = None
        saved = self._checkpointer.saved_entries(BEST_CHECKPOINT) if self.trainer.start_iter > 0 else {}
        if (
            saved.get("metric") == self._val_metric
            and saved.get("steps", saved["iteration"]) <= self.trainer.start_iter
        ):
            self.best_metric, self.best_iter = saved["score"], saved["iteration"]
            logger.info(f"The best {self._val_metric} so far is {self.best_metric:.4f}, of iteration {self.best_iter}")

    def after_train(self) -> None:
        # Detectron2's also runs after an error in the last iteration, on the ranks that had the error.
        if self.trainer.iter == self.trainer.max_iter:
            self._best_checking()

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest()
        if self._val_metric not in latest:
            self._report_missing(self._scores())
            return
        score, iteration = latest[self._val_metric]
        before = self.best_metric, self.best_iter
        is_better = before[0] is None or self._compare(score, before[0])
        if not (is_better and self._update_best(score, iteration)):  # NaN is never the best
            logger.info(f"{self._val_metric} {score:.4f} is not better than {_shown(*before)}")
            return
        weights = self._ema.weights if self._is_of_average and self._ema is not None else None
        # An evaluation in training has the number of the step that it follows, the one at the end that of all steps.
        steps = min(iteration + 1, self.trainer.max_iter)
        entries = {"iteration": iteration, "steps": steps, "metric": self._val_metric, "score": score}
        try:
            self._checkpointer.save_weights(BEST_CHECKPOINT, weights, **entries)
        except CheckpointWriteError as e:
            self.best_metric, self.best_iter = before
            if self.trainer.iter == self.trainer.max_iter:
                raise
            logger.error(f"{e} Training continues.")
            return
        logger.info(f"{self._val_metric} {score:.4f} is the best so far; before: {_shown(*before)}")

    def _scores(self) -> List[str]:
        """Return the names of the scores that evaluations have written: they are not smoothed, and have a task."""
        hints = self.trainer.storage.smoothing_hints()
        return [name for name, smooth in hints.items() if "/" in name and not (smooth or name.startswith("mgd/"))]

    def _report_missing(self, known: List[str]) -> None:
        if self._is_of_average and not any(name.startswith(f"{EMA_PREFIX}/") for name in known):
            return  # the average has not started yet
        text = (
            f"TEST.BEST.METRIC (train.best.metric) is {self._val_metric!r}, which the evaluation does not give."
            f"{did_you_mean(self._val_metric, known)} It gives {', '.join(sorted(known)) or 'no score'}"
        )
        if self.trainer.iter < self.trainer.max_iter:
            raise UserError(text)
        logger.error(f"{text}. There is no {BEST_CHECKPOINT}.pth.")  # the training is done


def _shown(score: Optional[float], iteration: Optional[int]) -> str:
    return "none" if score is None else f"{score:.4f} of iteration {iteration}"
