#!/usr/bin/env python
"""Puts the results of the studies into the tables of this project's README.

python projects/Classification/report.py            # writes README.md
python projects/Classification/report.py --check    # exit status 1 if it is not what the csv files give
"""

import argparse
import sys
from pathlib import Path
from typing import List, Optional

PROJECT = Path(__file__).resolve().parent
sys.path.append(str(PROJECT.parent / "AccuracyStudy"))  # its statistics, its csv and its tables

from accuracy_study.results import read_results  # noqa: E402
from classification.results import Accuracy, filled  # noqa: E402

from mgd_det.cli.error_reports import program  # noqa: E402
from mgd_det.errors import UserError  # noqa: E402
from mgd_det.files.outputs import writing  # noqa: E402


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", default=str(PROJECT / "README.md"), metavar="FILE")
    parser.add_argument("--results", default=str(PROJECT / "results"), metavar="DIR", help="folder of the csv files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not current")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write or check the page."""
    page = Path(args.page)
    rows = {path.stem: read_results(path, Accuracy) for path in sorted(Path(args.results).glob("*.csv"))}
    try:
        text = page.read_text(encoding="utf-8")
        made = filled(text, rows)
    except (OSError, ValueError) as e:
        raise UserError(f"page {page}: {e}") from e
    if args.check and made != text:
        raise UserError(f"{page} is not what {args.results} gives: run this program without --check")
    if not args.check:
        with writing(args.page, "--page"):
            page.write_text(made, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    program(parse_args, run)()
