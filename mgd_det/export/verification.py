"""Compare an exported detector with the one in PyTorch, object by object."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.structures import Instances
from scipy.optimize import linear_sum_assignment

from mgd_det.export.core import DenseCore
from mgd_det.export.runtime import ExportedDetector


@dataclass(frozen=True)
class Tolerance:
    """The largest differences that count as rounding.

    Attributes:
        outputs: of a raw output, over the largest absolute value of that output.
        boxes: of a coordinate, in pixels of the image.
        scores: of a score.
        masks: pixels that one of two masks has, over those that one or both have.
        keypoints: keypoints more than a pixel apart, over all.
        unmatched: objects that only one of the two finds, over all.
    """

    outputs: float = 1e-3
    boxes: float = 0.05
    scores: float = 1e-3
    masks: float = 0.01
    keypoints: float = 0.02
    unmatched: float = 0.01


@dataclass
class Difference:
    """What two detectors differ in, over some images; the names are those of :class:`Tolerance`.

    Attributes:
        sizes: height and width of the network's inputs, in the order of the images.
        detections: number of objects that the detector in PyTorch finds.
    """

    sizes: List[Tuple[int, int]] = field(default_factory=list)
    detections: int = 0
    values: Dict[str, float] = field(default_factory=dict)

    def beyond(self, tolerance: Tolerance) -> List[str]:
        """Return the names of the differences that are no rounding."""
        return [name for name, value in self.values.items() if not value <= getattr(tolerance, name)]


def verify(detector: Any, exported: ExportedDetector, inputs: Sequence[Dict[str, Any]], least: float) -> Difference:
    """Run both detectors on some images and compare what they find.

    Args:
        detector: the one in PyTorch, in eval mode.
        exported: the same one, exported.
        inputs: as Detectron2's mapper makes them, of any size.
        least: objects of the lowest scores are not missed, because rounding may push them out: those less than this
            above the lowest score of an image.
    """
    difference, counts = Difference(), _Counts()
    for entry in inputs:
        pixels = entry["image"]
        with torch.no_grad():
            expected = detector([entry])[0]["instances"].to("cpu")
        found = exported([entry])[0]["instances"]
        difference.sizes.append((pixels.shape[1], pixels.shape[2]))
        difference.detections += len(expected)
        counts.add(expected, found, least)
        if exported.settings["kind"] != "whole":
            counts.largest("outputs", _raw_difference(detector, exported, pixels))
    difference.values = counts.values()
    return difference


class _Counts:
    """Sums over images."""

    def __init__(self) -> None:
        self._largest: Dict[str, float] = {}
        self._shares: Dict[str, np.ndarray] = {"unmatched": np.zeros(2)}  # counted, of all

    def largest(self, name: str, value: float) -> None:
        self._largest[name] = float(np.maximum(self._largest.get(name, 0.0), value))  # NaN if one is

    def add(self, expected: Instances, found: Instances, least: float) -> None:
        pairs = _pairs(expected, found)
        scores = np.concatenate([expected.scores.numpy(), found.scores.numpy()])
        lost = np.ones(len(scores), dtype=bool)
        lost[[one for one, _ in pairs] + [len(expected) + other for _, other in pairs]] = False
        if len(scores):
            lost &= scores > scores.min() + least
        self._count("unmatched", int(lost.sum()), len(scores))
        self.largest("boxes", 0.0)
        self.largest("scores", 0.0)
        for one, other in pairs:
            distance = expected.pred_boxes.tensor[one] - found.pred_boxes.tensor[other]
            self.largest("boxes", float(distance.abs().max()))
            self.largest("scores", abs(float(expected.scores[one] - found.scores[other])))
            if expected.has("pred_masks"):
                masks = expected.pred_masks[one].numpy(), found.pred_masks[other].numpy()
                self._count("masks", int((masks[0] ^ masks[1]).sum()), int((masks[0] | masks[1]).sum()))
            if expected.has("pred_keypoints"):
                apart = expected.pred_keypoints[one, :, :2] - found.pred_keypoints[other, :, :2]
                self._count("keypoints", int((apart.abs().amax(dim=1) > 1).sum()), len(apart))

    def values(self) -> Dict[str, float]:
        shares = {name: float(part / total) if total else 0.0 for name, (part, total) in self._shares.items()}
        return {**self._largest, **shares}

    def _count(self, name: str, part: int, total: int) -> None:
        self._shares[name] = self._shares.get(name, np.zeros(2)) + [part, total]


def _pairs(expected: Instances, found: Instances) -> List[Tuple[int, int]]:
    """Pair objects of one class whose boxes are at most a pixel apart, so that the pairs are as close as possible."""
    one, other = expected.pred_boxes.tensor.numpy(), found.pred_boxes.tensor.numpy()
    apart = np.abs(one[:, None] - other[None]).max(axis=2, initial=0)
    possible = (expected.pred_classes.numpy()[:, None] == found.pred_classes.numpy()) & (apart <= 1)
    scores = np.abs(expected.scores.numpy()[:, None] - found.scores.numpy())
    rows, columns = linear_sum_assignment(np.where(possible, apart + 100 * scores, 1e6))
    return [(row, column) for row, column in zip(rows, columns) if possible[row, column]]


def _raw_difference(detector: Any, exported: ExportedDetector, pixels: torch.Tensor) -> float:
    """Return the largest difference of a raw output, over the largest absolute value of that output."""
    images = detector.preprocess_image([{"image": pixels}]).tensor
    with torch.no_grad():
        expected = [output.cpu().numpy() for output in DenseCore(detector).eval()(images)]
    found = exported.raw_outputs(pixels.numpy())
    return float(np.max([np.abs(a - b).max() / max(np.abs(a).max(), 1e-6) for a, b in zip(expected, found)]))
