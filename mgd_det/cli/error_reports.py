"""Turn exceptions into messages for the user and exit statuses."""

import argparse
import sys
import traceback
from typing import Callable, Optional, Sequence, TypeVar

from mgd_det.detectron2_warnings import ignore_detectron2_warnings
from mgd_det.distributed import ranks
from mgd_det.distributed.processes import Device, Main, launch
from mgd_det.engine.hooks.interruption import EXIT_INTERRUPTED, TrainingInterrupted
from mgd_det.engine.training_errors import death_of_worker
from mgd_det.errors import UserError

Result = TypeVar("Result")


def program(
    parse_args: Callable[[Optional[Sequence[str]]], argparse.Namespace], run: Callable[[argparse.Namespace], Result]
) -> Callable[..., Result]:
    """Return the main function of a program, which takes the arguments without its name, or those of the command line.

    Args:
        parse_args: reads them; None stands for those of the command line.
        run: does the work; its errors are reported as by :func:`run_program`. What it returns is the exit status.
    """

    def main(argv: Optional[Sequence[str]] = None) -> Result:
        args = parse_args(argv)
        return run_program(lambda: run(without_flags_among_overrides(args)))

    return main


def run_in_processes(main: Main, args: argparse.Namespace, device: Device) -> None:
    """Run ``main(args)`` in every process that the command line asks for, and report errors as :func:`run_program`.

    A training program calls only this, both in the process that the user starts and in each rank. For the arguments,
    see :func:`mgd_det.distributed.processes.launch`.
    """
    run_program(lambda: launch(main, without_flags_among_overrides(args), device, run_in_processes))


def without_flags_among_overrides(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments.

    Raises:
        UserError: a flag stands behind the overrides of the config, which take all that follows.
    """
    late = [opt for opt in getattr(args, "opts", None) or () if opt.startswith("--")]
    if late:
        raise UserError(f"{late[0]} stands behind the overrides of the config: flags come before them")
    return args


def run_program(main: Callable[[], Result]) -> Result:
    """Run the main function of a program; turn an error that a user can act on into one message and an exit status.

    The status is 1 for a UserError or a data loader's worker that died, :data:`EXIT_INTERRUPTED` (75) for a training
    that was saved and stopped after a signal, and 130 for any other SIGINT. Of several ranks, the first to fail prints
    its message.

    Raises:
        SystemExit: carries that status.
        Exception: any other error of ``main``. A rank prints its traceback and ends with status 1 instead.
    """
    ignore_detectron2_warnings()
    try:
        return main()
    except UserError as e:
        message, status = f"error: {_without_traceback(e)}", 1
    except TrainingInterrupted as e:
        message, status = str(e), EXIT_INTERRUPTED
    except KeyboardInterrupt:
        message, status = "error: interrupted", 130
    except SystemExit as e:
        if not e.code:
            raise
        message, status = ("", e.code) if isinstance(e.code, int) else (str(e.code), 1)
    except Exception as e:
        explanation = death_of_worker(e)
        if explanation is None and not ranks.is_rank():
            raise
        message, status = f"error: {explanation}" if explanation else traceback.format_exc().rstrip(), 1
    if ranks.is_first_to_fail() and message:
        print(message, file=sys.stderr)
    ranks.leave(status)


def _without_traceback(error: UserError) -> str:
    """Return the error's message without the traceback that torch adds when a loader's worker raised the error."""
    kind = type(error)
    return str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].rstrip()
