"""Turn errors of a training that a user can act on into one message without a traceback."""

import logging
import traceback
from contextlib import contextmanager
from typing import Iterator, Optional

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.distributed.ranks import has_failed_rank
from mgd_det.errors import UserError


@contextmanager
def explained_training_errors(checkpointer: TrainingCheckpointer, advice: str) -> Iterator[None]:
    """Turn errors of a training into a UserError, and keep Detectron2's loop from logging their traceback.

    Args:
        checkpointer: the training's; the message names the last checkpoint.
        advice: what to do about a loss that is not finite.

    Raises:
        UserError: a loss or gradient was not finite (FloatingPointError), or a worker of the data loader died.
    """
    loop_logger = logging.getLogger("detectron2.engine.train_loop")
    loop_logger.addFilter(_drop_explained)
    try:
        yield
    except FloatingPointError as e:
        raise UserError(
            f"{e}\nTraining stopped before it could reach the weights or another checkpoint. "
            f"{checkpointer.last_saved()} {advice}"
        ) from e
    except (RuntimeError, OSError, EOFError) as e:
        explanation = death_of_worker(e)
        if explanation is None:
            raise
        raise UserError(f"{explanation} {checkpointer.last_saved()}") from e
    finally:
        loop_logger.removeFilter(_drop_explained)


def death_of_worker(error: BaseException) -> Optional[str]:
    """Return what happened to a worker of the data loader and what to do; None if ``error`` has another cause."""
    said = ""
    link: Optional[BaseException] = error
    while link is not None:
        # The innermost is the most precise: it names the signal.
        if isinstance(link, RuntimeError) and str(link).startswith("DataLoader worker (pid"):
            said = str(link).split(". ")[0].rstrip(". ")
        elif isinstance(link, (OSError, EOFError)) and _has_frame_of(link, "torch.multiprocessing.reductions"):
            said = said or f"A worker of the data loader ended while it handed over a batch ({type(link).__name__})"
        link = link.__cause__ or link.__context__
    if not said:
        return None
    workers = "DATALOADER.NUM_WORKERS (dataloader.train.num_workers)"
    if "Bus error" in said:
        advice = f"Shared memory is full: raise it (docker run --shm-size=8g or --ipc=host), or lower {workers}."
    elif "Killed" in said:
        advice = f"Most often the system was out of memory: lower {workers}, or give the job more memory."
    else:
        advice = (
            f"It may have been out of memory: lower {workers}; at 0, the training's own process loads the images and "
            "shows the error if it happens again."
        )
    return f"{said}. {advice}"


def _has_frame_of(error: BaseException, module: str) -> bool:
    return any(frame.f_globals.get("__name__") == module for frame, _ in traceback.walk_tb(error.__traceback__))


def _drop_explained(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return True
    if has_failed_rank():
        return False  # the error of a rank whose partner is gone
    return not isinstance(error, (UserError, FloatingPointError)) and death_of_worker(error) is None
