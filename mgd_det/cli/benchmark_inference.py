"""Measures the inference of dense detectors on the CPU: PyTorch, ONNX Runtime in float32 and int8, OpenVINO.

All detectors and runtimes take turns in one run, and the ratios are taken in each round, so that a busy machine changes
them little. A detector without MODEL.WEIGHTS has random weights, which changes post-processing only.
"""

import argparse
import csv
import importlib.util
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from detectron2.modeling import build_model
from tabulate import tabulate

from mgd_det.benchmark import Spread, interleaved, ratio
from mgd_det.benchmark.inference import InferenceBenchmark
from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.cli.arguments import add_comparison_flags, check_names, image_size
from mgd_det.cli.error_reports import program
from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import without_distillation
from mgd_det.files.outputs import writable_file, writing

Times = Mapping[str, List[float]]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py --inference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=image_size, action="append", metavar="HxW", help="may be repeated (default: 320x320)"
    )
    add_comparison_flags(parser, rounds=20, of="of a RetinaNet or FCOS; ")
    parser.add_argument("--parts", action="store_true", help="also measure bottom-up, FPN, head and post-processing")
    parser.add_argument("--output", metavar="FILE", help="write the figures as json")
    parser.add_argument("--csv", metavar="FILE", help="write the table as a csv, with the times in milliseconds")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, and write the json and the csv."""
    for flag, path in (("--output", args.output), ("--csv", args.csv)):
        if path:
            writable_file(path, flag)
    check_names("--config-file", args.config_file)
    torch.set_num_threads(args.threads)
    has_openvino = importlib.util.find_spec("openvino") is not None
    if not has_openvino:
        print("OpenVINO is not installed (`pip install 'mgd_det[openvino]'`), so it is not measured", file=sys.stderr)
    functions, models = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, file) in enumerate(args.config_file):
            place = os.path.join(folder, str(number))
            os.mkdir(place)
            cfg = without_distillation(read_config(file, ["MODEL.DEVICE", "cpu", *args.opts]))
            detector = build_model(cfg).eval()
            WeightsCheckpointer(detector).load(cfg.MODEL.WEIGHTS)
            benchmark = models[name] = InferenceBenchmark(detector, cfg, place, args.threads, has_openvino)
            for size in args.size or [(320, 320)]:
                made = {**benchmark.networks(size), **(benchmark.parts(size) if args.parts else {})}
                functions.update({f"{name}, {size[0]}x{size[1]}, {key}": function for key, function in made.items()})
        times = interleaved(functions, repeats=args.rounds)
    print(table(times))
    print(model_table(models))
    if args.output:
        with writing(args.output, "--output"), open(args.output, "w", encoding="utf-8") as output:
            json.dump(report(times, models, args), output, indent=1)
        print(args.output)
    if args.csv:
        with writing(args.csv, "--csv"), open(args.csv, "w", encoding="utf-8", newline="") as output:
            csv.writer(output, lineterminator="\n").writerows(csv_rows(times, args.threads))
        print(args.csv)


def csv_rows(times: Times, threads: int) -> List[List[str]]:
    """Return the lines of the csv, the headers first: medians, the ends of the middle half of the rounds, the ratio."""
    headers = ["detector", "size", "measured", "median_ms", "lower_ms", "upper_ms", "ratio"]
    rows = [[*headers, "threads", "torch", "machine"]]
    about = [str(threads), torch.__version__, platform.machine()]
    for name, seconds in times.items():
        spread = Spread.of([1e3 * s for s in seconds])
        values = (spread.median, spread.lower, spread.upper, _relative(times, name).median)
        rows.append([*name.split(", "), *(f"{value:.4f}" for value in values), *about])
    return rows


def table(times: Times) -> str:
    """Format the times, and their ratios to PyTorch with the first detector at the same size."""
    rows = []
    for name, seconds in times.items():
        detector, size, what = name.split(", ")
        spread, relative = Spread.of([1e3 * s for s in seconds]), _relative(times, name)
        half = f"{spread.lower:.1f} to {spread.upper:.1f}"
        rows.append([detector, size, what, f"{spread.median:.1f} ms", half, f"{relative.median:.2f}"])
    headers = ["detector", "size", "", "median", "half of the rounds", "ratio to the first"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def model_table(models: Mapping[str, InferenceBenchmark]) -> str:
    """Format the sizes of the detectors."""
    rows = [
        [name, f"{model.parameters / 1e6:.2f}", *(f"{value / 2**20:.1f}" for value in model.file_bytes.values())]
        for name, model in models.items()
    ]
    files = next(iter(models.values())).file_bytes
    headers = ["detector", "parameters (M)", *(f"{name}, MiB" for name in files)]
    return "\n" + tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def report(times: Times, models: Mapping[str, InferenceBenchmark], args: argparse.Namespace) -> Dict[str, Any]:
    """Collect the content of the json."""
    return {
        "seconds": {name: asdict(Spread.of(seconds)) for name, seconds in times.items()},
        "ratios": {name: asdict(_relative(times, name)) for name in times},
        "rounds_s": times,
        "models": {name: {"parameters": m.parameters, "file_bytes": m.file_bytes} for name, m in models.items()},
        "about": {"threads": args.threads, "torch": torch.__version__, "machine": platform.machine()},
    }


def _relative(times: Times, name: str) -> Spread:
    size = name.split(", ")[1]
    first = next(key for key in times if key.split(", ")[1] == size)
    relative = ratio(times[name], times[first])
    assert relative is not None  # a network takes time
    return relative


main = program(parse_args, run)
