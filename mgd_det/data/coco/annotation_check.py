"""What can be wrong with the box, the mask and the keypoints of one annotation.

Shape shorthand in this module: H, W of the image in pixels.
"""

import operator
from math import isfinite
from typing import Any, Optional, Tuple

from mgd_det.data.coco import problems as kinds
from mgd_det.data.coco.problems import Problem, short

Size = Optional[Tuple[int, int]]  # (H, W); None if unknown

_BORDER = 1  # pixels that a box may stick out without a note: tools round in different ways
# Pixels from the image's corner. Beyond it, float32 cannot represent fractions of a pixel, and pycocotools needs
# memory for each pixel along a polygon's edge.
_FARTHEST = 100_000
_MAX_SHIFT = 60  # bits of a count before its last five; pycocotools reads it into 64


def box_problem(box: Any, size: Size) -> Optional[Problem]:
    """Check a "bbox", which must be [x, y, width, height] in pixels.

    Boxes that stick out and empty boxes do not break: Detectron2 clips the former and drops the latter.

    Returns:
        The problem, without its entry, or None.
    """
    try:
        x, y, width, height = box
        finite = isfinite(x + y + width + height)
        if bool in map(type, box):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        return Problem(kinds.INVALID_BOX, f"bbox {short(box)} is not four numbers (x, y, width, height)")
    if not finite:
        return Problem(kinds.INVALID_BOX, f"bbox {short(box)} is not finite")
    if width < 0 or height < 0:
        return Problem(kinds.INVALID_BOX, f"bbox {short(box)} (x, y, width, height) has a negative width or height")
    if max(abs(x), abs(y), width, height) > _FARTHEST:
        return Problem(kinds.INVALID_BOX, f"bbox {short(box)} reaches farther than {_FARTHEST} pixels")
    if width == 0 or height == 0:
        return Problem(kinds.EMPTY_BOX, f"bbox {short(box)} (x, y, width, height) has no area", breaks=False)
    if size is None:
        return None
    right, bottom, image_height, image_width = x + width, y + height, *size
    image = f"the image of {image_width} x {image_height}"
    if x >= image_width or y >= image_height or right <= 0 or bottom <= 0:
        return Problem(kinds.BOX_OUTSIDE, f"bbox {short(box)} lies outside {image}")
    if x < -_BORDER or y < -_BORDER or right > image_width + _BORDER or bottom > image_height + _BORDER:
        return Problem(kinds.BOX_STICKS_OUT, f"bbox {short(box)} sticks out of {image}", breaks=False)
    return None


def mask_problem(segmentation: Any, size: Size) -> Optional[Problem]:
    """Check a "segmentation" that is not empty: a list of polygons or an RLE.

    An invalid polygon beside valid ones does not break: Detectron2 drops it. If none is valid, it drops the object,
    even if only boxes are learned.

    Returns:
        The problem, without its entry, or None.
    """
    if isinstance(segmentation, list):
        return _polygons_problem(segmentation)
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, size)
    message = f"segmentation {short(segmentation)} is neither a list of polygons nor an RLE"
    return Problem(kinds.INVALID_POLYGON, message)


def is_evaluable(segmentation: Any) -> bool:
    """Return whether COCO's evaluator can read a mask that has no breaking problem.

    pycocotools judges all polygons by the first: with four numbers it is read as a box, with fewer as nothing.
    """
    return not isinstance(segmentation, list) or len(segmentation[0]) > 4


def keypoints_problem(keypoints: Any) -> Optional[Problem]:
    """Check "keypoints", which Detectron2's loader reads in every use; return the problem or None."""
    if not keypoints:
        return None
    if isinstance(keypoints, list) and len(keypoints) % 3 == 0:
        if all(type(value) in (int, float) and abs(value) <= _FARTHEST for value in keypoints):
            return None
    return Problem(kinds.WRONG_VALUE, f"keypoints {short(keypoints)} are not a list of numbers, three for each point")


def _polygons_problem(polygons: list) -> Optional[Problem]:
    valid = 0
    for polygon in polygons:
        try:
            if not isinstance(polygon, list) or bool in set(map(type, polygon)):
                raise TypeError
            # One sum instead of a test of each number: COCO has some 60 million.
            finite, length = isfinite(sum(polygon)), len(polygon)
        except (TypeError, OverflowError):  # OverflowError: an integer larger than any float
            return Problem(kinds.INVALID_POLYGON, f"polygon {short(polygon)} is not a list of numbers")
        if not finite:
            return Problem(kinds.INVALID_POLYGON, f"polygon {short(polygon)} has coordinates that are not finite")
        if length and max(max(polygon), -min(polygon)) > _FARTHEST:
            return Problem(kinds.INVALID_POLYGON, f"polygon {short(polygon)} reaches farther than {_FARTHEST} pixels")
        valid += length >= 6 and length % 2 == 0
    if valid == len(polygons):
        return None
    wanted = "three points or more, x and y of each"
    if valid == 0:
        return Problem(kinds.INVALID_POLYGON, f"segmentation {short(polygons)} has no valid polygon ({wanted})")
    message = f"{len(polygons) - valid} of {len(polygons)} polygons are invalid ({wanted})"
    return Problem(kinds.INVALID_POLYGON, message, breaks=False)


def _rle_problem(rle: dict, size: Size) -> Optional[Problem]:
    counts = rle.get("counts")
    try:
        height, width = map(operator.index, rle["size"])
        pixels = height * width
        total = _compressed_length(counts) if isinstance(counts, str) else _plain_length(counts)
    except (KeyError, TypeError, ValueError) as error:
        return Problem(kinds.INVALID_RLE, f"RLE {short(rle)} cannot be decoded ({type(error).__name__}: {error})")
    if size is not None and (height, width) != size:
        return Problem(kinds.INVALID_RLE, f"RLE has size (height, width) {short(rle['size'])}, the image {list(size)}")
    if total != pixels:
        return Problem(kinds.INVALID_RLE, f"RLE of size {short(rle['size'])} has counts for {total} pixels")
    return None


def _plain_length(counts: Any) -> int:
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError("a count is not a whole number >= 0")
    return sum(counts)


def _compressed_length(counts: str) -> int:
    """Return the number of pixels that COCO's compressed counts cover (see rleFrString in maskApi.c of pycocotools).

    pycocotools itself cannot be used for it: it trusts the counts and writes as many pixels as they say.
    """
    runs = [0, 0, 0]
    value = shift = 0
    for char in counts.encode("ascii"):
        char -= 48
        if not 0 <= char < 64:
            raise ValueError("invalid character in counts")
        if shift > _MAX_SHIFT:
            raise ValueError("a count is too large")
        value |= (char & 31) << shift
        shift += 5
        if not char & 32:
            if char & 16:
                value -= 1 << shift
            # From the fourth run on, counts are differences from the run before the last.
            run = value + (runs[-2] if len(runs) > 5 else 0)
            if run < 0:
                raise ValueError("negative count")
            runs.append(run)
            value = shift = 0
    if shift:
        raise ValueError("counts end within a number")
    return sum(runs)
