"""Train, distil and evaluate a detector: Detectron2's tools/train_net.py with MGD."""

import argparse
import os
from typing import Optional, Sequence

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from mgd_det.cli.error_reports import run_in_processes
from mgd_det.cli.yaml_setup import argument_parser, read_config, setup
from mgd_det.engine import Trainer, load_and_test
from mgd_det.visualization.scores import SCORES_FILE, write_scores


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the program.

    Args:
        argv: arguments without the program's name; None for the command line's.
    """
    run_in_processes(run, argument_parser().parse_args(argv), device)


def run(args: argparse.Namespace) -> None:
    """Run one process of the training."""
    cfg = setup(args)
    if args.eval_only or args.eval_teacher:
        results = load_and_test(cfg, resume=args.resume and not args.eval_teacher)
        if comm.is_main_process():
            write_scores(results, os.path.join(cfg.OUTPUT_DIR, SCORES_FILE))
            if not args.eval_teacher:
                verify_results(cfg, results)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def device(args: argparse.Namespace) -> str:
    """Return the config's device."""
    return read_config(args.config_file, args.opts).MODEL.DEVICE


if __name__ == "__main__":
    main()
