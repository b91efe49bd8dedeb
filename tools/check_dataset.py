#!/usr/bin/env python
"""Lists all that is wrong with a data set in COCO's format: its json, and every image, which is read whole.

    python tools/check_dataset.py --json train.json --images images/train
    python tools/check_dataset.py --json val.json --images images/val --eval --masks
    python tools/check_dataset.py --dataset coco_2017_train --output problems.json

The exit status is 1 where something breaks training or evaluation, and 0 otherwise. What is only noted does not:
Detectron2 copes with it. DATASETS.BROKEN_INPUT skip trains without the broken entries.
"""

import argparse
import json
import sys
from collections import Counter

from tabulate import tabulate
from tqdm import tqdm

from mgd_det.cli.error_reports import run_program
from mgd_det.data.coco.image_check import broken_images
from mgd_det.data.coco.register import CocoFiles, coco_files, find_problems
from mgd_det.errors import UserError


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="annotations in COCO's instances format")
    parser.add_argument("--images", metavar="DIR", help="folder of their images")
    parser.add_argument("--dataset", metavar="NAME", help="a registered data set, instead of --json and --images")
    parser.add_argument("--eval", action="store_true", help='annotations need "area" and "iscrowd": DATASETS.TEST')
    parser.add_argument("--masks", action="store_true", help='annotations need a "segmentation": MODEL.MASK_ON')
    parser.add_argument("--skip-decoding", action="store_true", help="do not read the images, only look for them")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that read images (default: one a CPU)")
    parser.add_argument("--output", metavar="FILE", help="write the problems to this json, too")
    args = parser.parse_args(argv)
    if bool(args.dataset) == bool(args.json) or bool(args.json) != bool(args.images):
        parser.error("give --json and --images, or --dataset")
    if args.workers is not None and args.workers < 1:
        parser.error("--workers: give a number > 0")
    return args


def files_of(args) -> CocoFiles:
    if args.json:
        return CocoFiles(args.json, args.images)
    files = coco_files(args.dataset)
    if files is None:
        raise UserError(f"--dataset {args.dataset} has no json in COCO's format on a local disk")
    return files


def collect(args, files: CocoFiles):
    keys = (["area", "iscrowd"] if args.eval else []) + (["segmentation"] if args.masks else [])
    report, problems = find_problems(args.dataset or args.json, files, keys)
    if not args.skip_decoding:
        with tqdm(desc="reading images", unit="image", leave=False) as bar:

            def progress(done, total):
                if bar.total is None:
                    bar.reset(total)
                bar.update(done - bar.n)

            problems += broken_images(
                files.image_root, report.images, problems, workers=args.workers, progress=progress
            )
    return report, problems


def table(problems) -> str:
    counts = Counter((not problem.breaks, problem.kind) for problem in problems)
    rows = [[kind, "noted" if noted else "breaks", count] for (noted, kind), count in sorted(counts.items())]
    return tabulate(rows, headers=["problem", "", "entries"])


def write(path: str, problems) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump([problem._asdict() for problem in problems], file, indent=1)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error}") from error


def run(args) -> int:
    files = files_of(args)
    report, problems = collect(args, files)
    for problem in problems:
        print(f"{'breaks' if problem.breaks else 'noted'}: {problem.kind}: {problem}")
    if args.output:
        write(args.output, problems)
    if problems:
        print(f"\n{table(problems)}")
    breaking = sum(problem.breaks for problem in problems)
    print(
        f"\n{files.json_file}: {len(report.images)} usable images, {report.num_annotations} annotations, "
        f"{len(report.classes)} classes; {breaking} problems that break training, {len(problems) - breaking} notes."
    )
    return int(breaking > 0)


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(run_program(lambda: run(arguments)))
