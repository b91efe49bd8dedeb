#!/usr/bin/env python
"""Puts the results of the studies into pages: tables with means, errors and paired differences, and curves.

    python projects/AccuracyStudy/report.py            # writes the pages and their pictures
    python projects/AccuracyStudy/report.py --check    # exit status 1 if they are not what the csv files give

The pages are README.md, docs/accuracy.md, docs/accuracy_parts.md and docs/latency.md, or those of --page. Only what
stands between their markers changes: see accuracy_study/page.py.
"""

import argparse
from pathlib import Path
from typing import List, Optional

from accuracy_study.page import render, stale_parts, write

from mgd_det.cli.error_reports import program
from mgd_det.errors import UserError
from mgd_det.files.outputs import writing

PROJECT = Path(__file__).resolve().parent
_PAGES = ("README.md", "docs/accuracy.md", "docs/accuracy_parts.md", "docs/latency.md")
PAGES = [PROJECT.parents[1] / name for name in _PAGES]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="append", metavar="FILE", help="may be repeated (default: all)")
    parser.add_argument("--results", default=str(PROJECT / "results"), metavar="DIR", help="folder of the csv files")
    parser.add_argument("--studies", default=str(PROJECT / "studies"), metavar="DIR", help="folder of the study files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is not current")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write or check the pages."""
    stale: List[Path] = []
    for page in map(Path, args.page or PAGES):
        made = render(page, Path(args.results), Path(args.studies))
        if args.check:
            stale += stale_parts(page, made)
            continue
        with writing(str(page), "--page"):
            write(page, made)
        for path in (page, *(picture.path for picture in made.pictures)):
            print(path)
    if stale:
        raise UserError(
            f"{', '.join(map(str, stale))}: not what {args.results} gives; run this program without --check"
        )


if __name__ == "__main__":
    program(parse_args, run)()
