"""Train, distil and evaluate what a LazyConfig describes: Detectron2's program of this name with MGD."""

import argparse
from typing import Optional, Sequence

from mgd_det.cli import lazy_setup
from mgd_det.cli.error_reports import run_in_processes
from mgd_det.cli.yaml_setup import argument_parser
from mgd_det.engine import lazy_trainer


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the program.

    Args:
        argv: arguments without the program's name; None for the command line's.
    """
    run_in_processes(run, argument_parser().parse_args(argv), device)


def run(args: argparse.Namespace) -> None:
    """Run one process of the training."""
    cfg = lazy_setup.setup(args)
    if args.eval_only:
        lazy_trainer.evaluate(cfg, resume=args.resume)
    else:
        lazy_trainer.train(cfg, resume=args.resume)


def device(args: argparse.Namespace) -> str:
    """Return the config's device."""
    return lazy_setup.read_config(args.config_file, args.opts).train.device


if __name__ == "__main__":
    main()
