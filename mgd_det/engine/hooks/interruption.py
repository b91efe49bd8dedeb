"""The hook that saves a training on SIGTERM or SIGINT and ends it with an exit status of its own."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Dict, Optional

from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm

from mgd_det.checkpoint.training_checkpointer import TrainingCheckpointer
from mgd_det.distributed.ranks import has_failed_rank
from mgd_det.engine.training_step import TrainStep

# Exit status of a training that was saved after a signal: "temporary failure, try again" (EX_TEMPFAIL of sysexits.h).
# For a process that a signal ended at once, without saving, a shell shows 128 + the signal's number.
EXIT_INTERRUPTED = 75
# Launcher, scheduler and terminal may each forward the same signal: within this many seconds it counts once.
_ONE_SIGNAL = 2.0


class TrainingInterrupted(BaseException):
    """Raised on every rank after a signal stopped the training and it was saved.

    It is not an Exception: Detectron2's loop would log it as an error, and nothing went wrong.
    """


class Interruption(HookBase):
    """Saves and stops the training after the step in which any rank received SIGTERM or SIGINT.

    A second signal, at least 2 seconds after the first, ends the process at once, as without the hook. A signal during
    a matching update or an evaluation takes effect after the step that follows. A signal in the last step or later
    takes effect before the evaluation at the end.

    Register the hook after all hooks that change what is saved. The handlers are installed from before_train to
    after_train, in the main thread only.
    """

    def __init__(self, checkpointer: TrainingCheckpointer, step: TrainStep) -> None:
        """
        Args:
            checkpointer: the training's.
            step: the training step, in which all ranks agree to stop.
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
            return  # Python allows handlers in the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            # A program that a shell starts in the background ignores SIGINT, and must still ignore it.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._replaced[number] = signal.signal(number, self._on_signal)

    def after_step(self) -> None:
        iteration = self.trainer.iter
        # The last iteration is saved anyway, as "model_final".
        if self._step.stop_agreed and iteration + 1 < self.trainer.max_iter:
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            self._end(f"after iteration {iteration}")

    def after_train(self) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()
        if self._step.stop_agreed and self.trainer.iter == self.trainer.max_iter:
            # The hooks behind this one do not run, but what they have logged must not be lost.
            for hook in self.trainer._hooks:
                if isinstance(hook, PeriodicWriter):
                    hook.after_train()
            self._end("after the last iteration, before the evaluation")

    def _end(self, when: str) -> None:
        saved = self._checkpointer.get_checkpoint_file()
        raise TrainingInterrupted(f"training stopped by a signal {when}, saved as {saved}; --resume continues it")

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader inherits the handler, but its parent decides
        now = time.monotonic()
        if self._received is None:
            self._received = now
            self._step.request_stop()
            # After a rank has failed, the launcher sends this signal to the others; the failed rank says why.
            if comm.is_main_process() and not has_failed_rank():
                # A plain system call, because the signal may interrupt a print or a log record.
                name = signal.Signals(number).name
                os.write(2, f"{name}: stopping after this step; repeat it to end at once without saving\n".encode())
        elif now - self._received >= _ONE_SIGNAL:
            signal.signal(number, self._replaced[number])
            os.kill(os.getpid(), number)
