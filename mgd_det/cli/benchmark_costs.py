"""Measures what detectors of any kind cost on one image on the CPU: parameters, multiply-adds and time.

Weights are random. The network runs without the final NMS of a dense detector; an R-CNN with the proposals of its
config, and masks or keypoints of 100 objects. All detectors take turns in one run; the ratios are to the first, taken
in each round, so that a busy machine changes them little.
"""

import argparse
from typing import Dict, List, Mapping, Optional, Sequence

import torch
from detectron2.modeling import build_model
from tabulate import tabulate

from mgd_det.benchmark import Spread, interleaved, ratio
from mgd_det.benchmark.costs import NetworkRun, parameters_of
from mgd_det.cli.arguments import add_comparison_flags, check_names, image_size
from mgd_det.cli.error_reports import program
from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import without_distillation


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py --costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=image_size, default=(320, 320), metavar="HxW", help="default: 320x320")
    add_comparison_flags(parser, rounds=8)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure, and print the table."""
    check_names("--config-file", args.config_file)
    torch.set_num_threads(args.threads)
    runs: Dict[str, NetworkRun] = {}
    sizes: Dict[str, List[str]] = {}
    for name, file in args.config_file:
        cfg = without_distillation(read_config(file, ["MODEL.DEVICE", "cpu", *args.opts]))
        detector = build_model(cfg).eval()
        runs[name] = NetworkRun(detector, *args.size)
        sizes[name] = [f"{parameters_of(detector) / 1e6:.2f}", f"{runs[name].multiply_adds() / 1e9:.2f}"]
    print(table(sizes, interleaved(runs, repeats=args.rounds, warmup=1)))


def table(sizes: Mapping[str, Sequence[str]], times: Mapping[str, Sequence[float]]) -> str:
    """Format a row for each detector.

    Args:
        sizes: parameters and multiply-adds, by detector.
        times: seconds in each round, by detector; the ratios are to the first.
    """
    rows, first = [], next(iter(times.values()))
    for name, seconds in times.items():
        spread, relative = Spread.of([1e3 * s for s in seconds]), ratio(seconds, first)
        assert relative is not None  # a network takes time
        half = f"{relative.lower:.2f} to {relative.upper:.2f}"
        rows.append([name, *sizes[name], f"{spread.median:.0f}", f"{relative.median:.2f}", half])
    headers = ["detector", "parameters (M)", "multiply-adds (G)", "ms", "ratio to the first", "half of the rounds"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


main = program(parse_args, run)
