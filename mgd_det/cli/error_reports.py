"""From exceptions to what a user reads."""

import sys
from typing import Callable, TypeVar

from mgd_det.distributed.ranks import is_first_to_fail
from mgd_det.engine.hooks.interruption import EXIT_INTERRUPTED, TrainingInterrupted
from mgd_det.engine.training_errors import death_of_worker
from mgd_det.errors import UserError

Result = TypeVar("Result")


def run_program(main: Callable[[], Result]) -> Result:
    """Runs the main function of a program; what a user can mend, or has done, becomes one message and an exit status.

    The statuses: 1 for a UserError or a data loader's worker that died; :data:`EXIT_INTERRUPTED` (75) where a signal
    stopped a training that was saved; 130 for SIGINT elsewhere. Of several ranks, the first to end says why.
    """
    try:
        return main()
    except UserError as e:
        message, status = f"error: {_without_traceback(e)}", 1
    except TrainingInterrupted as e:
        message, status = str(e), EXIT_INTERRUPTED
    except KeyboardInterrupt:
        message, status = "error: interrupted", 130
    except (RuntimeError, OSError, EOFError) as e:
        explanation = death_of_worker(e)
        if explanation is None:
            raise
        message, status = f"error: {explanation}", 1
    if is_first_to_fail():
        print(message, file=sys.stderr)
    sys.exit(status)


def _without_traceback(error: UserError) -> str:
    """Its message; torch puts the traceback of a loader's worker before it, and raises it anew."""
    kind = type(error)
    return str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].rstrip()
