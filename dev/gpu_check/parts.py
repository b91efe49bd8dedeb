"""The parts of the check: what each runs, and how long it may take."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import List, Sequence

from mgd_det.errors import UserError, did_you_mean

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """A program that runs in a process of its own.

    Attributes:
        name: its name in the results.
        kind: "correct" (tests), "speed", "loss", "teacher" or "accuracy".
        seconds: its time limit.
        files: the test files of kind "correct".
        config: the config of kind "speed".
    """

    name: str
    kind: str
    seconds: float
    files: Sequence[str] = ()
    config: str = ""

    def command(self, output: str, dry_run: bool, photos: str, seconds: float) -> List[str]:
        """Return its command line.

        Args:
            output: the json that the part writes; tests write none.
            photos: folder of the Fashion-MNIST files, or "".
            seconds: what it has left, for a part that plans its work.
        """
        if self.kind == "correct":
            # Others run on the CPU in any case.
            files = [file for file in self.files if file.startswith("tests/gpu") or not dry_run]
            return [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", *files]
        flags = ["--dry-run"] * dry_run + ["--photos", photos] * bool(photos)
        program = [sys.executable, str(ROOT / "dev" / "gpu_check.py"), "--run-part", self.name]
        return [*program, "--output", output, "--seconds", f"{seconds:.0f}", *flags]


def _speed(name: str, seconds: float) -> Part:
    folder = "COCO-InstanceSegmentation" if name.startswith("mask") else "COCO-Detection"
    return Part(name, "speed", seconds, config=f"{folder}/{name}_FPN_mgd_R50_1x.yaml")


# In the order in which they run; those of kind "correct" run side by side. What is asked most comes first.
PARTS = (
    Part("matching", "correct", 90, files=("tests/gpu/test_matching.py",)),
    Part("compiled", "correct", 90, files=("tests/gpu/test_compiled_loss.py",)),
    Part("training", "correct", 90, files=("tests/gpu/test_training.py",)),
    Part("nccl", "correct", 90, files=("tests/gpu/test_nccl.py",)),
    _speed("retinanet_R_18", 65),
    Part("loss_pass", "loss", 45),
    _speed("mask_rcnn_R_18", 40),
    Part("teacher", "teacher", 60),
    Part("teacher_compile", "teacher", 60),
    _speed("retinanet_MobileNetV2", 30),
    _speed("mask_rcnn_MobileNetV2", 30),
    _speed("retinanet_ShuffleNetV2", 30),
    _speed("mask_rcnn_ShuffleNetV2", 30),
    Part("accuracy", "accuracy", 300),
)


def chosen(names: Sequence[str]) -> List[Part]:
    """Return the parts of these names and kinds, in their order; all if there is no name.

    Raises:
        UserError: there is no such part.
    """
    known = list(dict.fromkeys([part.kind for part in PARTS] + [part.name for part in PARTS]))
    for name in names:
        if name not in known:
            raise UserError(f"--parts {name!r} is no part.{did_you_mean(name, known)} Use some of {', '.join(known)}")
    return [part for part in PARTS if not names or part.name in names or part.kind in names]
