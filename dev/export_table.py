#!/usr/bin/env python
"""Exports students in detectors, small and with random weights, and prints how far they are from PyTorch.

python dev/export_table.py                                    # each student with one detector, in turn
python dev/export_table.py --whole                            # with post-processing inside, RetinaNet and FCOS too
python dev/export_table.py --all                              # every pair; about ten seconds each on an idle core
python dev/export_table.py --detector fcos --student R18 --student timm_convnext_atto
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import exported  # noqa: E402
import toy  # noqa: E402


def row(detector: str, student: str, whole: bool) -> list:
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            difference = exported.exported_difference(detector, student, Path(folder), whole)
        except Exception as e:  # of the exporter; the table goes on
            return [detector, student, "", "", "", f"{type(e).__name__}: {str(e).splitlines()[0][:60]}", ""]
    values, beyond = difference.values, difference.beyond(exported.TOLERANCE)
    shown = [f"{values[name]:.1e}" if name in values else "" for name in ("outputs", "boxes", "scores")]
    result = (
        "differs: " + ", ".join(f"{name} {values[name]:.2g}" for name in beyond)
        if beyond
        else f"equal, {difference.detections} objects"
    )
    return [detector, student, *shown, result, f"{time.process_time() - start:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every pair")
    parser.add_argument("--whole", action="store_true", help="as tools/export.py --with-nms does; R-CNNs always are")
    parser.add_argument("--detector", action="append", choices=list(exported.DETECTORS))
    parser.add_argument("--student", action="append", choices=list(toy.STUDENTS))
    args = parser.parse_args()
    pairs = exported.PAIRS
    if args.all or args.detector or args.student:
        detectors, students = args.detector or list(exported.DETECTORS), args.student or list(toy.STUDENTS)
        pairs = [(detector, student) for detector in detectors for student in students]
    rows = []
    for pair in pairs:
        rows.append(row(*pair, args.whole))
        print(*rows[-1], sep=" | ", flush=True)
    headers = ["detector", "student", "raw outputs", "boxes (pixels)", "scores", "", "CPU s"]
    print("\n" + tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    sys.exit(any("equal" not in entry[5] for entry in rows))


if __name__ == "__main__":
    main()
