"""Converts a data set of YOLO's or Pascal VOC's format to jsons in COCO's format, and checks them.

The jsons go to instances_<split>.json in the output folder; the images stay where they are. A file that is there
already is never replaced. The exit status is 1 if the check finds something that breaks training.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from mgd_det.cli import check_dataset
from mgd_det.cli.error_reports import program
from mgd_det.data.conversion import CocoSplit, read_voc, read_yolo
from mgd_det.errors import UserError
from mgd_det.files.atomic_files import write_text_atomically
from mgd_det.files.outputs import writable_folder, writing

# Flags of tools/train_net.py that take a split.
_FLAGS = {"train": "train", "trainval": "train", "all": "train", "val": "val", "test": "val"}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="YOLO: data.yaml or its folder. VOC: the folder of JPEGImages and Annotations (VOCdevkit/VOC2012)",
    )
    parser.add_argument("--format", choices=("yolo", "voc"), help="default: by what the source has")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="folder of the jsons")
    parser.add_argument("--skip-decoding", action="store_true", help="check without reading the images in full")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Convert, check, and return the exit status."""
    classes, splits = _read(Path(args.source), args.format)
    paths = [os.path.join(args.output_dir, f"instances_{split.name}.json") for split in splits]
    there = [path for path in paths if os.path.exists(path)]
    if there:
        raise UserError(f"--output-dir has {', '.join(there)} already: delete that, or give another folder")
    writable_folder(args.output_dir, "--output-dir")
    for split, path in zip(splits, paths):
        with writing(path, "--output-dir"):
            write_text_atomically(path, json.dumps(split.content(classes)))
    return max(_check(split, path, args.skip_decoding) for split, path in zip(splits, paths))


def _read(source: Path, kind: Optional[str]) -> Tuple[List[str], List[CocoSplit]]:
    data_yaml = source / "data.yaml" if source.is_dir() else source
    if kind is None:
        kind = "voc" if (source / "Annotations").is_dir() else "yolo" if data_yaml.is_file() else None
    if kind is None:
        raise UserError(
            f"{source} is neither a data.yaml (YOLO), nor a folder that has one, nor one with Annotations (Pascal VOC)"
        )
    return read_voc(source) if kind == "voc" else read_yolo(data_yaml)


def _check(split: CocoSplit, path: str, skip_decoding: bool) -> int:
    """Run tools/check_dataset.py on a json, and print the flags for training with it."""
    has_masks = bool(split.annotations) and all("segmentation" in entry for entry in split.annotations)
    argv = ["--json", path, "--images", str(split.image_root), "--eval"]
    argv += ["--masks"] * has_masks + ["--skip-decoding"] * skip_decoding
    status = check_dataset.run(check_dataset.parse_args(argv))
    flag = _FLAGS[split.name]
    flags = shlex.join([f"--{flag}-json", path, f"--{flag}-images", str(split.image_root)])
    masks = sum("segmentation" in entry for entry in split.annotations)
    print(f"{split.name}: {masks} of {len(split.annotations)} objects have a mask. To use it: {flags}\n")
    return status


main = program(parse_args, run)

if __name__ == "__main__":
    sys.exit(main())
