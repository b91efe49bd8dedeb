"""SIGTERM and SIGINT during training: finish the step, save, end with a status of its own."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Dict, Optional

from detectron2.engine import HookBase
from detectron2.utils import comm

from mgd_det.checkpoint.training_checkpointer import TrainingCheckpointer
from mgd_det.distributed.ranks import has_failed_rank
from mgd_det.engine.training_step import TrainStep

# Exit status of a training that a signal stopped and that was saved: "temporary failure, try again" (EX_TEMPFAIL of
# sysexits.h). If a signal ended a process at once, a shell shows 128 + its number, and nothing was saved.
EXIT_INTERRUPTED = 75
# Launcher, scheduler and terminal may each pass the same signal on: within this many seconds it counts once.
_ONE_SIGNAL = 2.0


class TrainingInterrupted(BaseException):
    """Ends a training that a signal stopped, on every rank, after it was saved.

    It is not an Exception, as nothing went wrong: Detectron2's loop would log it as an error.
    """


class Interruption(HookBase):
    """Stops the training after the step in which SIGTERM or SIGINT came to any of its ranks, and saves it.

    A second signal, 2 seconds after the first or later, does what it did without the hook: it ends the process at
    once. A signal that comes during a matching update or an evaluation takes effect after it and the step that follows;
    one during the last step, or after it, before the evaluation at the end.

    Put the hook behind all hooks that change what is saved. Handlers are installed between before_train and
    after_train, in the main thread only.
    """

    def __init__(self, checkpointer: TrainingCheckpointer, step: TrainStep) -> None:
        """
        Args:
            checkpointer: of the training.
            step: of the training; by it all ranks agree to stop.
        """
        self._checkpointer = checkpointer
        self._step = step
        self._replaced: Dict[int, Any] = {}  # handlers by signal
        self._process = 0
        self._received: Optional[float] = None

    def before_train(self) -> None:
        self._process, self._received = os.getpid(), None
        self._step.forget_stop()
        if threading.current_thread() is not threading.main_thread():
            return  # Python sets handlers in the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            # A program that a shell starts in the background ignores SIGINT, and must still ignore it.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._replaced[number] = signal.signal(number, self._on_signal)

    def after_step(self) -> None:
        iteration = self.trainer.iter
        # The checkpoint of the last iteration is the checkpointer's own, "model_final".
        if self._step.stop_agreed and iteration + 1 < self.trainer.max_iter:
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            self._end(f"after iteration {iteration}")

    def after_train(self) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()
        if self._step.stop_agreed and self.trainer.iter == self.trainer.max_iter:
            self._end("after the last iteration, before the evaluation")

    def _end(self, when: str) -> None:
        saved = self._checkpointer.get_checkpoint_file()
        raise TrainingInterrupted(f"training stopped by a signal {when}, saved as {saved}; --resume continues it")

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader inherits the handler; its parent decides
        now = time.monotonic()
        if self._received is None:
            self._received = now
            self._step.request_stop()
            # Where a rank has failed, the launcher ends the others by this signal, and that rank says why.
            if comm.is_main_process() and not has_failed_rank():
                # By the system call, as this may interrupt a print or a line of the log.
                name = signal.Signals(number).name
                os.write(2, f"{name}: stopping after this step; repeat it to end at once without saving\n".encode())
        elif now - self._received >= _ONE_SIGNAL:
            signal.signal(number, self._replaced[number])
            os.kill(os.getpid(), number)
