"""The hook that saves a training every so many iterations, and removes old checkpoints."""

import logging
import os
from typing import Any, Dict, Optional

from detectron2.engine import hooks

from mgd_det.checkpoint.resumable import periodic_iteration
from mgd_det.checkpoint.training_checkpointer import CheckpointWriteError, TrainingCheckpointer
from mgd_det.errors import UserError

logger = logging.getLogger(__name__)


class CheckpointHook(hooks.PeriodicCheckpointer):
    """Detectron2's hook, for which one failure of the disk is not the end, and which counts across resumes.

    A periodic checkpoint that cannot be written is logged as an error; the next one is tried in its turn. A second
    failure in a row, or one at the last iteration, ends the training with a UserError. A checkpoint that is refused
    because of values that are not finite ends it at once.

    Old checkpoints are removed after a new one is safely there: all ``model_<iteration>.pth`` in the folder but the
    newest ``max_to_keep``, whether this run wrote them or the one that it resumes. "model_final.pth" and checkpoints of
    later iterations, which are of another training, stay.
    """

    def __init__(self, checkpointer: TrainingCheckpointer, period: int, max_to_keep: Optional[int] = None) -> None:
        """
        Args:
            period: iterations between two checkpoints, > 0.
            max_to_keep: how many to keep, >= 0; None or 0 for all.
        """
        if period <= 0:
            raise UserError(f"SOLVER.CHECKPOINT_PERIOD (train.checkpointer.period) is {period}; give a number > 0")
        if max_to_keep is not None and max_to_keep < 0:
            raise UserError(
                f"SOLVER.CHECKPOINTS_KEPT (train.checkpointer.max_to_keep) is {max_to_keep}; give a number > 0, or 0 "
                "to keep all"
            )
        super().__init__(checkpointer, period)  # which would remove only what this run wrote
        self._max_to_keep = max_to_keep or 0
        self._has_failed = False

    def step(self, iteration: int, **kwargs: Any) -> None:
        is_last = self.max_iter is not None and iteration >= self.max_iter - 1
        try:
            super().step(iteration, **kwargs)
        except CheckpointWriteError as e:
            if self._has_failed or is_last:
                raise
            self._has_failed = True
            logger.error(f"{e} Training goes on meanwhile, and ends if the next checkpoint cannot be written either.")
            return
        if (iteration + 1) % self.period == 0:
            self._has_failed = False
            self._remove_old(iteration)

    def _remove_old(self, iteration: int) -> None:
        if self._max_to_keep == 0:
            return
        saved: Dict[int, str] = {}
        for path in self.checkpointer.get_all_checkpoint_files():
            number = periodic_iteration(os.path.basename(path))
            if number is not None and number <= iteration:
                saved[number] = path
        for number in sorted(saved)[: -self._max_to_keep]:
            try:
                self.path_manager.rm(saved[number])
            except OSError as e:
                logger.warning(f"The old checkpoint {saved[number]} cannot be removed: {e}")
