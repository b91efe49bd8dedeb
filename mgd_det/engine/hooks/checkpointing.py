"""The hook that saves a training periodically and removes old checkpoints."""

import logging
import os
from typing import Any, Dict, Optional

from detectron2.engine import hooks
from detectron2.utils import comm

from mgd_det.checkpoint.resumable import periodic_iteration
from mgd_det.checkpoint.training_checkpointer import CheckpointWriteError, TrainingCheckpointer
from mgd_det.errors import ArgumentError, check_count

logger = logging.getLogger(__name__)


class CheckpointHook(hooks.PeriodicCheckpointer):
    """Detectron2's hook, but it tolerates one failure of the disk and counts checkpoints across resumes.

    Register it on every rank, because saving is collective; all ranks fail or continue together.

    If a periodic checkpoint cannot be written, an error is logged, and training continues to the next one. A second
    failure in a row, or one at the last iteration, ends the training with a UserError. So does, at once, a checkpoint
    with values that are not finite.

    Once a new checkpoint is complete, old ones are removed: all ``model_<iteration>.pth`` in the folder but the newest
    ``max_to_keep``, including those of the run that this one resumes. "model_final.pth" stays, and so do checkpoints
    of later iterations, which belong to another training.
    """

    def __init__(self, checkpointer: TrainingCheckpointer, period: int, max_to_keep: Optional[int] = None) -> None:
        """
        Args:
            period: iterations between two checkpoints, > 0.
            max_to_keep: how many to keep, >= 0; None or 0 for all.

        Raises:
            ArgumentError: a value is not as above.
        """
        check_count("period", period)
        if max_to_keep is not None and max_to_keep < 0:
            raise ArgumentError("max_to_keep", f"is {max_to_keep}; give a number > 0, or 0 to keep all")
        super().__init__(checkpointer, period)  # its own max_to_keep would remove only what this run wrote
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
            logger.error(f"{e} Training continues, and ends if the next checkpoint cannot be written either.")
            return
        if (iteration + 1) % self.period == 0:
            self._has_failed = False
            if self._max_to_keep > 0 and comm.is_main_process():
                self._remove_old(iteration)

    def _remove_old(self, iteration: int) -> None:
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
