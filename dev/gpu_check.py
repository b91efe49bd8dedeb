#!/usr/bin/env python
"""Ask a GPU all that only a GPU can show, in nine minutes: is it correct, how fast is it, what does it gain.

python dev/gpu_check.py --output output/gpu_check.json
python dev/gpu_check.py --dry-run                                 # every part in tiny sizes on the CPU
python dev/gpu_check.py --output output/gpu_check.json --page docs/performance.md    # only put the tables there

Each part runs in a process of its own with a time limit, and its results go to the json when it ends, so that a run
that is cut short is worth what it got. The exit status is 1 if a test did not pass, or tests did not end.
"""

import argparse
import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

# Not the folder of this file alone: where it is imported as a module, too.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gpu_check.measuring import Records, save_json
from gpu_check.page import section, tables, write_section
from gpu_check.parts import PARTS, ROOT, Part, chosen
from gpu_check.processes import Outcome, run_side_by_side

from mgd_det.cli.error_reports import run_program
from mgd_det.errors import UserError
from mgd_det.files.outputs import writable_file

_TEST_LINE = re.compile(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.MULTILINE)
_SECONDS, _ALL_DRY_SECONDS = 540.0, 1800.0  # for all parts
_DRY_SECONDS = 300.0  # a part's limit in a dry run
_LEAST_SECONDS = 15.0  # with less a part is not started
_LOG_LINES = 30


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/gpu_check.json", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", default=[], metavar="NAME", help="only these parts or kinds of parts")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"for all parts; default: {_SECONDS:.0f}")
    parser.add_argument("--photos", default="", metavar="DIR", help="folder of the four Fashion-MNIST files")
    parser.add_argument("--page", metavar="FILE", help="put the tables of --output into this page, and run nothing")
    parser.add_argument("--run-part", choices=[p.name for p in PARTS], metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.seconds is None:
        args.seconds = _ALL_DRY_SECONDS if args.dry_run else _SECONDS
    return args


def run(args: argparse.Namespace) -> int:
    """Run the check, one part of it, or only write its page. Return the exit status."""
    if args.run_part:
        run_part(next(p for p in PARTS if p.name == args.run_part), args)
        return 0
    if args.page:
        write_section(Path(args.page), section(read_results(args.output)))
        return 0
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use: --dry-run runs every part in tiny sizes on the CPU")
    Path(args.output).resolve().parent.mkdir(parents=True, exist_ok=True)
    writable_file(args.output, "--output")
    results: Dict[str, Any] = {"about": _about(args.dry_run), "parts": {}}
    deadline = time.monotonic() + args.seconds
    for parts in _steps(chosen(args.parts), args.dry_run):
        run_parts(parts, deadline, args, results)
    print("\n".join(tables(results["parts"])))
    print(args.output)
    correct = [of["status"] == "done" for of in results["parts"].values() if of["kind"] == "correct"]
    return 0 if all(correct) else 1


def _steps(parts: Sequence[Part], dry_run: bool) -> List[List[Part]]:
    """Return what runs side by side, step by step: the tests, which time nothing; in a dry run everything."""
    if dry_run:
        return [sorted(parts, key=lambda part: -part.seconds)]  # the longest first, so that no core is idle at the end
    tests = [part for part in parts if part.kind == "correct"]
    return [tests] * bool(tests) + [[part] for part in parts if part.kind != "correct"]


def run_parts(parts: Sequence[Part], deadline: float, args: argparse.Namespace, results: Dict[str, Any]) -> None:
    """Run parts side by side, and save the results with each part's outcome as it ends."""
    left = deadline - time.monotonic()
    if left < _LEAST_SECONDS:
        for part in parts:
            results["parts"][part.name] = {"kind": part.kind, "status": "not started", "seconds": 0.0, "result": []}
        save_json(args.output, results)
        return
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        outputs = {part.name: Path(folder) / f"{part.name}.json" for part in parts}
        logs = {part.name: Path(folder) / f"{part.name}.txt" for part in parts}
        commands = {}
        for part in parts:
            seconds = min(left, _DRY_SECONDS if args.dry_run else part.seconds)
            photos = str(Path(args.photos).resolve()) if args.photos else ""
            command = part.command(str(outputs[part.name]), args.dry_run, photos, seconds - 5.0)
            commands[part.name] = (command, seconds)
        print(f"{', '.join(commands)} ...", file=sys.stderr, flush=True)
        workers = len(os.sched_getaffinity(0)) if args.dry_run else None
        by_name = {part.name: part for part in parts}
        for name, outcome in run_side_by_side(commands, logs, _environment(args.dry_run), ROOT, workers):
            text = logs[name].read_text(encoding="utf-8", errors="replace")
            entry = _entry(by_name[name], outcome, text, outputs[name])
            done = {**results["parts"], name: entry}
            results["parts"] = {part.name: done[part.name] for part in chosen(args.parts) if part.name in done}
            save_json(args.output, results)
            print(f"{name}: {entry['status']}, {entry['seconds']:.0f} s", file=sys.stderr, flush=True)
            if entry["status"] != "done":
                print("\n".join(entry["log"]), file=sys.stderr, flush=True)


def _environment(dry_run: bool) -> Dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if dry_run:
        # The tests run on the CPU instead of being skipped; what is asked to compile does not, which takes minutes.
        environment.update(MGD_GPU_TESTS="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
    return environment


def _entry(part: Part, outcome: Outcome, text: str, output: Path) -> Dict[str, Any]:
    """Return what the json has of a part."""
    if part.kind == "correct":
        result: Any = tests_of_log(text)
        is_done = outcome.status == 0 and "PASSED" in result.values()
    else:
        result = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
        is_done = outcome.status == 0
    status = "done" if is_done else "out of time" if outcome.status is None else f"failed (status {outcome.status})"
    entry = {"kind": part.kind, "status": status, "seconds": round(outcome.seconds, 1), "result": result}
    return entry if is_done else {**entry, "log": text.splitlines()[-_LOG_LINES:]}


def tests_of_log(text: str) -> Dict[str, str]:
    """Return the outcome of each test in the output of ``pytest -v``, also of one that was cut."""
    return dict(_TEST_LINE.findall(text))


def run_part(part: Part, args: argparse.Namespace) -> None:
    """Run a part that measures, in this process."""
    if part.kind == "accuracy":
        from gpu_check.accuracy import measure_accuracy

        measure_accuracy(args.output, args.photos, args.seconds, args.dry_run)
        return
    records = Records(args.output)
    if part.kind == "speed":
        from gpu_check.speed import measure_steps

        measure_steps(part.config, records, args.dry_run)
    elif part.kind == "loss":
        from gpu_check.loss_pass import measure_loss_pass

        measure_loss_pass(records, args.dry_run)
    else:
        from gpu_check.teacher_options import measure_teacher

        measure_teacher(records, part.name == "teacher_compile", args.dry_run)


def read_results(path: str) -> Dict[str, Any]:
    """Read the json of a check.

    Raises:
        UserError: it cannot be read.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        results["about"], results["parts"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--output {path} has no results of this program: {e!r}") from e
    return results


def _about(dry_run: bool) -> Dict[str, Any]:
    sys.path.append(str(ROOT / "projects" / "AccuracyStudy"))
    from accuracy_study.tasks import commit_of

    has_gpu = torch.cuda.is_available() and not dry_run
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit_of(ROOT),
        "dry_run": dry_run,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    arguments = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the running parts are ended, too
    sys.exit(run_program(lambda: run(arguments)))
