#!/usr/bin/env python
"""Puts the results of the studies into a page: tables with means, errors and paired differences, and curves.

    python projects/AccuracyStudy/report.py            # writes docs/accuracy.md and its pictures
    python projects/AccuracyStudy/report.py --check    # exit status 1 if they are not what the csv files give

Only what stands between the page's markers changes: see accuracy_study/page.py.
"""

import argparse
from pathlib import Path
from typing import List, Optional

from accuracy_study.page import render, stale_parts, write

from mgd_det.cli.error_reports import run_program
from mgd_det.errors import UserError
from mgd_det.files.outputs import writing

PROJECT = Path(__file__).resolve().parent
ROOT = PROJECT.parents[1]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", default=str(ROOT / "docs" / "accuracy.md"), metavar="FILE")
    parser.add_argument("--results", default=str(PROJECT / "results"), metavar="DIR", help="folder of the csv files")
    parser.add_argument("--studies", default=str(PROJECT / "studies"), metavar="DIR", help="folder of the study files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is not current")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write or check the page."""
    page = Path(args.page)
    made = render(page, Path(args.results), Path(args.studies))
    if not args.check:
        with writing(args.page, "--page"):
            write(page, made)
        for path in (page, *(picture.path for picture in made.pictures)):
            print(path)
        return
    stale = stale_parts(page, made)
    if stale:
        raise UserError(
            f"{', '.join(map(str, stale))}: not what {args.results} gives; run this program without --check"
        )


if __name__ == "__main__":
    arguments = parse_args()
    run_program(lambda: run(arguments))
