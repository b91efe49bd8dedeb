"""From exceptions to what a user reads."""

import logging
import sys
from contextlib import contextmanager
from typing import Callable, Iterator, TypeVar

from detectron2.checkpoint import DetectionCheckpointer
from torch.multiprocessing import ProcessExitedException

from mgd_det.errors import UserError

Result = TypeVar("Result")


def run_program(main: Callable[[], Result]) -> Result:
    """Runs the main function of a program: a UserError becomes one message and exit status 1.

    Where ``main`` launches processes which end this way themselves, their exit status is passed on.
    """
    try:
        return main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except ProcessExitedException as e:
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def explained_training_errors(checkpointer: DetectionCheckpointer, advice: str) -> Iterator[None]:
    """Within it Detectron2's training loop logs no traceback of what says all by itself: UserError, a loss of NaN.

    Args:
        checkpointer: of the training, to name what was saved last.
        advice: what to do against a loss that is not finite.

    Raises UserError in the place of the FloatingPointError of such a loss.
    """
    loop_logger = logging.getLogger("detectron2.engine.train_loop")
    loop_logger.addFilter(_drop_explained)
    try:
        yield
    except FloatingPointError as e:
        saved = checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else ""
        raise UserError(
            f"{e}\nTraining stopped before another checkpoint was written. "
            + (f"The last checkpoint is {saved}. " if saved else "There is no checkpoint yet. ")
            + advice
        ) from e
    finally:
        loop_logger.removeFilter(_drop_explained)


def _drop_explained(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (UserError, FloatingPointError))
