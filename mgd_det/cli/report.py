"""Writes report.html and model_card.md of a training again, for example after --eval-teacher has scored its teacher.

Give the config.yaml of its OUTPUT_DIR. A training writes both by itself at its end.
"""

import argparse
import os
from typing import Optional, Sequence

from mgd_det.cli.data_setup import use_coco_folders
from mgd_det.cli.error_reports import program
from mgd_det.cli.yaml_setup import read_config, use_available_device, use_folder_of_training
from mgd_det.engine.run_report import yaml_run
from mgd_det.errors import UserError
from mgd_det.files.outputs import writing
from mgd_det.files.student_files import STUDENT_CONFIG
from mgd_det.files.unsafe_files import add_unsafe_files_flag
from mgd_det.visualization.report import write_report


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="OUTPUT_DIR/config.yaml of the training")
    add_unsafe_files_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the config: REPORT.ALONE FOLDER ...")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write both files and print their paths."""
    if os.path.basename(args.config_file) == STUDENT_CONFIG:
        raise UserError(
            f"--config-file {args.config_file} is the plain student's config, which says nothing of its training: give "
            "config.yaml of the same folder"
        )
    cfg = read_config(args.config_file, args.opts)
    use_available_device(cfg)
    use_coco_folders(cfg)
    use_folder_of_training(cfg, args.config_file, args.opts)
    if not os.path.isdir(cfg.OUTPUT_DIR):
        cfg.OUTPUT_DIR = os.path.dirname(os.path.abspath(args.config_file))
    with writing(cfg.OUTPUT_DIR, "OUTPUT_DIR"):
        print("\n".join(write_report(yaml_run(cfg))))


main = program(parse_args, run)


if __name__ == "__main__":
    main()
