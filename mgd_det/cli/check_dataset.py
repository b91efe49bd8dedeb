"""Lists everything that is wrong with a data set in COCO's format: its json, and every image, which is read in full.

The exit status is 1 if something breaks training or evaluation, and 0 otherwise. Notes do not break: Detectron2 can
handle them. DATASETS.BROKEN_INPUT skip trains without the broken entries.
"""

import argparse
import json
import sys
from collections import Counter
from typing import List, Optional, Sequence, Tuple

from tabulate import tabulate
from tqdm import tqdm

from mgd_det.cli.arguments import positive
from mgd_det.cli.error_reports import program
from mgd_det.data.coco.check import CocoReport
from mgd_det.data.coco.image_check import broken_images
from mgd_det.data.coco.problems import Problem
from mgd_det.data.coco.register import CocoFiles, coco_files, find_problems
from mgd_det.errors import UserError
from mgd_det.files.outputs import writable_file, writing


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="annotations in COCO's instances format")
    parser.add_argument("--images", metavar="DIR", help="folder of their images")
    parser.add_argument("--dataset", metavar="NAME", help="a registered data set, instead of --json and --images")
    parser.add_argument("--eval", action="store_true", help='annotations need "area" and "iscrowd": DATASETS.TEST')
    parser.add_argument("--masks", action="store_true", help='annotations need a "segmentation": MODEL.MASK_ON')
    parser.add_argument("--keypoints", action="store_true", help='annotations need "keypoints": MODEL.KEYPOINT_ON')
    parser.add_argument("--skip-decoding", action="store_true", help="do not read the images, only look for them")
    parser.add_argument("--workers", type=positive, metavar="N", help="threads that read images (default: one per CPU)")
    parser.add_argument("--output", metavar="FILE", help="also write the problems to this json")
    args = parser.parse_args(argv)
    if bool(args.dataset) == bool(args.json) or bool(args.json) != bool(args.images):
        parser.error("give --json and --images, or --dataset")
    return args


def run(args: argparse.Namespace) -> int:
    """Check the data set, and return the exit status."""
    if args.output:
        writable_file(args.output, "--output")
    files = _files_of(args)
    report, problems = _collect(args, files)
    for problem in problems:
        print(f"{'breaks' if problem.breaks else 'noted'}: {problem.kind}: {problem}")
    if args.output:
        with writing(args.output, "--output"), open(args.output, "w", encoding="utf-8") as file:
            json.dump([problem._asdict() for problem in problems], file, indent=1)
    if problems:
        print(f"\n{_table(problems)}")
    breaking = sum(problem.breaks for problem in problems)
    print(
        f"\n{files.json_file}: {len(report.images)} usable images, {report.num_annotations} annotations, "
        f"{len(report.classes)} classes; {breaking} problems that break training, {len(problems) - breaking} notes."
    )
    return int(breaking > 0)


def _files_of(args: argparse.Namespace) -> CocoFiles:
    if args.json:
        return CocoFiles(args.json, args.images)
    files = coco_files(args.dataset)
    if files is None:
        raise UserError(
            f"--dataset {args.dataset} has no json in COCO's format on a local disk: give --json and --images"
        )
    return files


def _collect(args: argparse.Namespace, files: CocoFiles) -> Tuple[CocoReport, List[Problem]]:
    keys = ["area", "iscrowd"] * args.eval + ["segmentation"] * args.masks + ["keypoints"] * args.keypoints
    report, problems = find_problems(args.dataset or args.json, files, keys)
    if not args.skip_decoding:
        with tqdm(desc="reading images", unit="image", leave=False) as bar:

            def progress(done: int, total: int) -> None:
                if bar.total is None:
                    bar.reset(total)
                bar.update(done - bar.n)

            images = report.images
            problems += broken_images(files.image_root, images, problems, workers=args.workers, progress=progress)
    return report, problems


def _table(problems: Sequence[Problem]) -> str:
    counts = Counter((not problem.breaks, problem.kind) for problem in problems)
    rows = [[kind, "noted" if noted else "breaks", count] for (noted, kind), count in sorted(counts.items())]
    return tabulate(rows, headers=["problem", "", "entries"])


main = program(parse_args, run)

if __name__ == "__main__":
    sys.exit(main())
