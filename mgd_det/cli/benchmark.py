"""Measures what distillation adds to a training step: times and memory as ratios, in one run, interleaved.

Images and weights are random, so that nothing is downloaded; data loading is not part of a step here.

With --inference first, it measures the inference of detectors in several runtimes instead, and with --costs first their
parameters, multiply-adds and time in PyTorch: see --inference --help and --costs --help.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch.autograd import DeviceType

from mgd_det.benchmark import DistillationBenchmark, Spread, interleaved, peak_bytes, ratio
from mgd_det.cli import benchmark_costs, benchmark_inference
from mgd_det.cli.arguments import image_size, positive
from mgd_det.cli.error_reports import run_program
from mgd_det.cli.yaml_setup import read_config, use_available_device
from mgd_det.config import MGD_BACKBONE, head_loss_keys
from mgd_det.errors import UserError
from mgd_det.files.outputs import writable_file, writing
from mgd_det.files.unsafe_files import add_unsafe_files_flag

Times = Mapping[str, List[float]]
Peaks = Mapping[str, int]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the program.

    Args:
        argv: the arguments without the program's name; None for those of the command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for flag, other in (("--inference", benchmark_inference.main), ("--costs", benchmark_costs.main)):
        if flag in arguments:
            arguments.remove(flag)
            other(arguments)
            return
    args = _parse_args(arguments)
    run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if args.output:
        writable_file(args.output, "--output")
    cfg = read_config(args.config_file, args.opts)
    _check_config(cfg, args.config_file)
    warning = use_available_device(cfg)
    if warning:
        print(warning, file=sys.stderr)
    benchmark = DistillationBenchmark(cfg, size=args.size, batch=args.batch)
    times, peaks = measure(benchmark, args.steps)
    print(table(times, peaks))
    if args.profile:
        print(profile(benchmark))
    if args.output:
        with writing(args.output, "--output"), open(args.output, "w") as file:
            json.dump(report(times, peaks, _about(args, benchmark.device)), file, indent=2)
        print(args.output)


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
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


def _check_config(cfg: CfgNode, name: str) -> None:
    if cfg.MODEL.BACKBONE.NAME != MGD_BACKBONE:
        raise UserError(f"--config-file {name} has no distillation: set MODEL.BACKBONE.NAME to {MGD_BACKBONE}")
    for key in head_loss_keys(cfg):
        raise UserError(f"{key} is not 0, but only the backbones are measured: set it to 0")
    if cfg.MODEL.MGD.LOSS.MASK.NAME == "scores":
        raise UserError("MODEL.MGD.LOSS.MASK.NAME is 'scores', but only the backbones are measured: set it to ''")


def _about(args: argparse.Namespace, device: torch.device) -> Dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "config": args.config_file,
        "opts": args.opts,
        "size": list(args.size),
        "batch": args.batch,
        "steps": args.steps,
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def measure(bench: DistillationBenchmark, steps: int) -> Tuple[Times, Peaks]:
    """Measure the times of all functions, and the most memory that some of them take, by name."""

    def every(part):
        return lambda: [part(p) for p in bench.positions]

    whole_steps = {"plain_step": bench.plain_step, "distilled_step": bench.distilled_step}
    forwards = {
        "teacher_bottom_up": bench.teacher_bottom_up,
        "student_bottom_up": bench.student_bottom_up,
    }
    parts = {"distillation_part": every(bench.distillation_part), "naive_part": every(bench.naive_part)}
    matching = {
        "online_step": bench.online_step,
        "observation": bench.observation,
        "measuring_pass": bench.measuring_pass,
        "assignment": bench.assignment,
        "copies": every(bench.copies),
    }
    if not bench.positions:  # every position learns channel i from channel i
        parts, matching = {}, {}
    functions = {**whole_steps, **forwards, **matching, **parts}
    for p in bench.positions:
        functions[f"distillation_part_{p.name}"] = lambda p=p: bench.distillation_part(p)
        functions[f"naive_part_{p.name}"] = lambda p=p: bench.naive_part(p)
    times = interleaved(functions, repeats=steps, device=bench.device)
    peaks = {name: peak_bytes(function, bench.device) for name, function in {**parts, **whole_steps}.items()}
    return times, peaks


def ratios(times: Times, peaks: Peaks) -> Dict[str, Optional[Spread]]:
    """Compute the ratios of times and of memory, by what they compare.

    One is None if a function takes no time, or was not measured because no position of the config has a matching.
    """

    def time(over: str, *under: str) -> Optional[Spread]:
        return of(times, over, *under)

    def of(figures: Mapping[str, List[float]], over: str, *under: str) -> Optional[Spread]:
        if any(name not in figures for name in (over, *under)):
            return None
        return ratio(figures[over], *(figures[name] for name in under))

    return {
        "distilled step / (plain step + teacher's bottom-up)": time(
            "distilled_step", "plain_step", "teacher_bottom_up"
        ),
        "distilled step / plain step": time("distilled_step", "plain_step"),
        "online step / distilled step": time("online_step", "distilled_step"),
        "observation of an online step / distilled step": time("observation", "distilled_step"),
        "naive part / distillation part": time("naive_part", "distillation_part"),
        "distillation part / copying as much memory": time("distillation_part", "copies"),
        "memory of the distillation part / of the naive one": of(
            {name: [peak] for name, peak in peaks.items()}, "distillation_part", "naive_part"
        ),
        "measuring pass / both bottom-ups": time("measuring_pass", "student_bottom_up", "teacher_bottom_up"),
    }


def table(times: Times, peaks: Peaks) -> str:
    """Format all figures as a table."""

    def row(name, spread, form, unit=""):
        median, lower, upper = (format(x, form) for x in (spread.median, spread.lower, spread.upper))
        return [name, median + unit, f"{lower} to {upper}"]

    rows = [row(what, of, ".2f") if of else [what, "-", "-"] for what, of in ratios(times, peaks).items()]
    rows += [row(name, Spread.of([1e3 * s for s in of]), ".1f", " ms") for name, of in times.items()]
    rows += [[f"{name}, peak", f"{value / 2**20:.1f} MiB", ""] for name, value in peaks.items()]
    headers = ["", "median", "half of the rounds"]
    return tabulate(rows, headers=headers, colalign=("left", "right", "right"), disable_numparse=True)


def report(times: Times, peaks: Peaks, about: Dict[str, Any]) -> Dict[str, Any]:
    """Collect the content of the json: medians, bytes, ratios with their quartiles, and the times of each round."""
    return {
        **{f"{name}_s": Spread.of(of).median for name, of in times.items()},
        **{f"{name}_peak_bytes": value for name, value in peaks.items()},
        "ratios": {what: of and asdict(of) for what, of in ratios(times, peaks).items()},
        "rounds_s": times,
        "about": about,
    }


_NAME_LENGTH = 80  # of an operation; C++ kernels have names of a thousand characters


def profile(bench: DistillationBenchmark) -> str:
    """List the operations of a distilled step that take the most time, with their share of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        bench.distilled_step()
    operations, time_of = list(profiler.key_averages()), "self_cpu_time_total"
    if bench.device.type == "cuda":
        # Only the kernels: an operation that starts a kernel is listed with the kernel's time, too.
        operations = [e for e in operations if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        time_of = "self_device_time_total"
    operations.sort(key=lambda e: getattr(e, time_of), reverse=True)
    total = sum(getattr(e, time_of) for e in operations)
    rows = [
        [e.key[:_NAME_LENGTH], e.count, f"{getattr(e, time_of) / 1e3:.1f} ms", f"{getattr(e, time_of) / total:.1%}"]
        for e in operations
    ]
    return tabulate(rows[:14], headers=["operation", "calls", "own time", "share"], disable_numparse=True)
