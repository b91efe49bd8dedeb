#!/usr/bin/env python
"""Writes a json in COCO's format that has some of another's classes, and all of its images.

    python projects/AccuracyStudy/keep_classes.py datasets/fashion_scenes/small/annotations/instances_train.json \
        datasets/fashion_scenes/small/annotations/clothes_train.json "T-shirt/top" Trouser Pullover Dress Coat

A teacher that is trained on it has other classes than its student. Objects of the other classes become background.
"""

import argparse
import json
import os
from typing import List, Optional

from mgd_det.cli.error_reports import program
from mgd_det.errors import UserError, did_you_mean, first_line
from mgd_det.files.atomic_files import write_text_atomically
from mgd_det.files.outputs import writing


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="JSON", help="a json in COCO's format, which stays as it is")
    parser.add_argument("output", metavar="OUTPUT", help="the json to write")
    parser.add_argument("classes", nargs="+", metavar="CLASS", help="names of the classes to keep")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write the json of the command line."""
    if os.path.exists(args.output):
        raise UserError(f"OUTPUT: {args.output} is there already: delete it, or give another name")
    try:
        with open(args.source, encoding="utf-8") as file:
            content = json.load(file)
        classes = {category["name"]: category["id"] for category in content["categories"]}
        objects = [(entry["category_id"], entry) for entry in content.get("annotations", [])]
    except OSError as e:
        raise UserError(f"JSON: {args.source} cannot be read: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"JSON: {args.source} is not a json in COCO's format: {first_line(e)}") from e
    for name in args.classes:
        if name not in classes:
            raise UserError(f"{args.source} has no class {name!r}." + did_you_mean(name, list(classes)))
    kept = {classes[name] for name in args.classes}
    content["categories"] = [category for category in content["categories"] if category["id"] in kept]
    content["annotations"] = [entry for category, entry in objects if category in kept]
    with writing(args.output, "OUTPUT"):
        write_text_atomically(args.output, json.dumps(content))
    left = len(content["annotations"])
    print(f"{args.output}: {len(kept)} of {len(classes)} classes, {left} of {len(objects)} objects")


main = program(parse_args, run)

if __name__ == "__main__":
    main()
