#!/usr/bin/env python
"""Writes weights of torchvision or MoCo-v2 as a checkpoint of this project's models.

python projects/Classification/import_weights.py torchvision://resnet50 output/classification/resnet50.pth
python projects/Classification/import_weights.py moco_v2_200ep_pretrain.pth.tar output/classification/moco_v2_r50.pth
"""

import argparse
import os
from typing import List, Optional

import torch
from classification.weights import read_weights, renamed

from mgd_det.cli.error_reports import run_program
from mgd_det.files.atomic_files import write_atomically
from mgd_det.files.outputs import writing


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="torchvision://<model>, a URL, or a file")
    parser.add_argument("output", metavar="FILE", help="the checkpoint to write, .pth")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Convert the weights of the command line."""
    model = renamed(read_weights(args.source), args.source)
    with writing(args.output, "FILE"):
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        write_atomically(args.output, lambda file: torch.save({"model": model}, file))
    print(f"{len(model)} tensors of {args.source}: {args.output}")


if __name__ == "__main__":
    arguments = parse_args()
    run_program(lambda: run(arguments))
