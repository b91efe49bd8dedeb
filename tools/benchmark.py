#!/usr/bin/env python
"""Measures what distillation adds to a training step: times and memory as ratios, in one run, interleaved.

python tools/benchmark.py --config-file FashionScenes/retinanet_MobileNetV2_FPN_mgd_R50.yaml --size 128x128 --batch 8
python tools/benchmark.py --config-file COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml --size 800x1344 --batch 2

Images and weights are random, so that nothing is downloaded; data loading is not part of a step here.
"""

import argparse
import json
import platform
import re
import sys
from dataclasses import asdict

import torch
from tabulate import tabulate
from torch.autograd import DeviceType
from tqdm import tqdm

from mgd_det.benchmark import DistillationBenchmark, Spread, interleaved, peak_bytes, ratio
from mgd_det.cli.arguments import positive
from mgd_det.cli.error_reports import run_program
from mgd_det.cli.yaml_setup import read_config, use_available_device
from mgd_det.config import MGD_BACKBONE
from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import add_unsafe_files_flag


def image_size(text):
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no HxW of at least 32x32")
    return tuple(map(int, match.groups()))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a config with distillation")
    parser.add_argument("--size", type=image_size, default=(800, 1344), metavar="HxW", help="default: 800x1344")
    parser.add_argument("--batch", type=positive, default=2, metavar="N", help="images a step (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also show where the time of a distilled step goes")
    parser.add_argument("--output", metavar="FILE", help="write the figures as json")
    add_unsafe_files_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the config: KEY VALUE ...")
    return parser.parse_args(argv)


def measure(bench, steps):
    """The times of all functions, and the most memory that some of them take, by name."""

    def every(part):
        return lambda: [part(p) for p in bench.positions]

    parts = {"distillation_part": every(bench.distillation_part), "naive_part": every(bench.naive_part)}
    functions = {
        "plain_step": bench.plain_step,
        "distilled_step": bench.distilled_step,
        "online_step": bench.online_step,
        "observation": bench.observation,
        "teacher_bottom_up": bench.teacher_bottom_up,
        "student_bottom_up": bench.student_bottom_up,
        "measuring_pass": bench.measuring_pass,
        "assignment": bench.assignment,
        **parts,
        "copies": every(bench.copies),
    }
    for p in bench.positions:
        functions[f"distillation_part_{p.name}"] = lambda p=p: bench.distillation_part(p)
        functions[f"naive_part_{p.name}"] = lambda p=p: bench.naive_part(p)
    with tqdm(desc="rounds", unit="round") as bar:

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        times = interleaved(functions, repeats=steps, device=bench.device, progress=progress)
    whole = {name: functions[name] for name in ("plain_step", "distilled_step")}
    peaks = {name: peak_bytes(function, bench.device) for name, function in {**parts, **whole}.items()}
    return times, peaks


def ratios(times, peaks):
    """What the times are for: what to its :class:`Spread`, or None."""

    def time(over, *under):
        return ratio(times[over], *(times[name] for name in under))

    return {
        "distilled step / (plain step + teacher's bottom-up)": time(
            "distilled_step", "plain_step", "teacher_bottom_up"
        ),
        "distilled step / plain step": time("distilled_step", "plain_step"),
        "online step / distilled step": time("online_step", "distilled_step"),
        "observation of an online step / distilled step": time("observation", "distilled_step"),
        "naive part / distillation part": time("naive_part", "distillation_part"),
        "distillation part / copying as much memory": time("distillation_part", "copies"),
        "memory of the distillation part / of the naive one": ratio(
            [peaks["distillation_part"]], [peaks["naive_part"]]
        ),
        "measuring pass / both bottom-ups": time("measuring_pass", "student_bottom_up", "teacher_bottom_up"),
    }


def table(times, peaks):
    def row(name, spread, form, unit=""):
        median, lower, upper = (format(x, form) for x in (spread.median, spread.lower, spread.upper))
        return [name, median + unit, f"{lower} to {upper}"]

    rows = [row(what, of, ".2f") if of else [what, "-", "-"] for what, of in ratios(times, peaks).items()]
    rows += [row(name, Spread.of([1e3 * s for s in of]), ".1f", " ms") for name, of in times.items()]
    rows += [[f"{name}, peak", f"{value / 2**20:.1f} MiB", ""] for name, value in peaks.items()]
    headers = ["", "median", "half of the rounds"]
    return tabulate(rows, headers=headers, colalign=("left", "right", "right"), disable_numparse=True)


def report(times, peaks, about):
    """The json: medians, bytes, ratios with their quartiles, and what they are made of."""
    return {
        **{f"{name}_s": Spread.of(of).median for name, of in times.items()},
        **{f"{name}_peak_bytes": value for name, value in peaks.items()},
        "ratios": {what: of and asdict(of) for what, of in ratios(times, peaks).items()},
        "rounds_s": times,
        "about": about,
    }


def profile(bench):
    """The operations of a distilled step that take the most time, with their share of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        bench.distilled_step()
    operations, time_of = list(profiler.key_averages()), "self_cpu_time_total"
    if bench.device.type == "cuda":
        # The kernels alone: the time of a kernel is also said of the operation that started it.
        operations = [e for e in operations if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        time_of = "self_device_time_total"
    operations.sort(key=lambda e: getattr(e, time_of), reverse=True)
    total = sum(getattr(e, time_of) for e in operations)
    rows = [
        [e.key, e.count, f"{getattr(e, time_of) / 1e3:.1f} ms", f"{getattr(e, time_of) / total:.1%}"]
        for e in operations
    ]
    return tabulate(rows[:14], headers=["operation", "calls", "time of its own", "share"], disable_numparse=True)


def run(args):
    cfg = read_config(args.config_file, args.opts)
    if cfg.MODEL.BACKBONE.NAME != MGD_BACKBONE:
        raise UserError(
            f"--config-file {args.config_file} has no distillation: MODEL.BACKBONE.NAME is not {MGD_BACKBONE}"
        )
    if cfg.MODEL.MGD.LOGITS.WEIGHT != 0:
        raise UserError("MODEL.MGD.LOGITS.WEIGHT is not 0: the benchmark is of the backbones alone; set it to 0")
    warning = use_available_device(cfg)
    if warning:
        print(warning, file=sys.stderr)
    bench = DistillationBenchmark(cfg, size=args.size, batch=args.batch)
    times, peaks = measure(bench, args.steps)
    print(table(times, peaks))
    if args.profile:
        print(profile(bench))
    if args.output:
        cuda = bench.device.type == "cuda"
        about = {
            "config": args.config_file,
            "opts": args.opts,
            "size": list(args.size),
            "batch": args.batch,
            "steps": args.steps,
            "device": torch.cuda.get_device_name(bench.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        try:
            with open(args.output, "w") as file:
                json.dump(report(times, peaks, about), file, indent=2)
        except OSError as e:
            raise UserError(f"--output {args.output} cannot be written: {e}") from e
        print(args.output)


if __name__ == "__main__":
    arguments = parse_args()
    run_program(lambda: run(arguments))
