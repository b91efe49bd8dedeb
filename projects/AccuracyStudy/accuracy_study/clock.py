"""The hook that measures what a training costs: its steps and matching updates, and nothing else."""

import time
from typing import Any, Dict

from detectron2.engine import HookBase


class StepClock(HookBase):
    """Sums the time of the steps, with the matching updates between them.

    Start-up, evaluation and saving are left out. Register it before all other hooks: a step then begins before their
    ``before_step``, where the matching is updated, and ends before their ``after_step``, where the rest is done.

    The sums are saved in the checkpoints, so those of a resumed training are of the whole training.

    Attributes:
        seconds: wall-clock time.
        cpu_seconds: CPU time of this process, all threads together. On a machine that is shared with other work, it
            varies less than wall-clock time. Work of the data loader counts if DATALOADER.NUM_WORKERS is 0.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._start = self._cpu_start = 0.0

    def before_step(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def after_step(self) -> None:
        self.seconds += time.perf_counter() - self._start
        self.cpu_seconds += time.process_time() - self._cpu_start

    def state_dict(self) -> Dict[str, Any]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self.seconds, self.cpu_seconds = state_dict["seconds"], state_dict["cpu_seconds"]
