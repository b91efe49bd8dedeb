"""The hook that writes report.html and model_card.md at the end of a training."""

import dataclasses
import logging
import sys
from typing import Callable, Dict

import torch
from detectron2.engine import HookBase

from mgd_det.errors import first_line
from mgd_det.visualization.report import Run, write_report

logger = logging.getLogger(__name__)


class ReportHook(HookBase):
    """Writes the report of a training that came to its end. Register it on rank 0, after the writers.

    Whatever goes wrong is one warning in the log: the training is done, and its result is saved.
    """

    def __init__(self, build_run: Callable[[], Run]) -> None:
        """
        Args:
            build_run: describes the training; called at its end.
        """
        self._build_run = build_run

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return
        try:
            run = dataclasses.replace(self._build_run(), memory=peak_memory())
            paths = write_report(run)
        except Exception as e:
            logger.warning(f"The report of the training could not be written: {type(e).__name__}: {first_line(e)}")
            logger.debug("Details:", exc_info=True)
        else:
            logger.info(f"Wrote {' and '.join(paths)}")


def peak_memory() -> Dict[str, int]:
    """Return the most memory that this process has used so far, in bytes: of itself, and of the GPU if there is one."""
    memory: Dict[str, int] = {}
    if torch.cuda.is_available():
        memory["GPU"] = torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return memory
    unit = 1 if sys.platform == "darwin" else 1024
    memory["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return memory
