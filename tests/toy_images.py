"""Small data sets of classified images, made on the spot, and the updates of a matching schedule."""

import numpy as np
from PIL import Image

from mgd_det.engine.matching_schedule import MatchingSchedule


def picture(path, shade: int, size=(40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(path)


def cub_folder(root, images: int = 24) -> None:
    """24 images of two classes; every third is of the test set."""
    root.mkdir(parents=True)
    lines = {"images": [], "image_class_labels": [], "train_test_split": []}
    for i in range(1, images + 1):
        path = f"{i % 2 + 1:03}.bird/{i}.png"
        picture(root / "images" / path, i)
        lines["images"].append(f"{i} {path}")
        lines["image_class_labels"].append(f"{i} {i % 2 + 1}")
        lines["train_test_split"].append(f"{i} {int(i % 3 > 0)}")
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("\n".join(content) + "\n")


def write_photos(folder, number: int = 6) -> np.ndarray:
    """Both splits as idx files; label i % 10 for photo i. Returns the pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (number, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        header = np.array([2051, number, 28, 28], dtype=">i4").tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.arange(number, dtype=np.uint8) % 10
        header = np.array([2049, number], dtype=">i4").tobytes()
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return pixels


def dues(periods: list, milestones: list, end: int) -> list:
    schedule, found, now = MatchingSchedule(periods, milestones), [], 0
    while (now := schedule.next_due(now)) < end:
        found.append(now)
    return found
