"""What can be wrong with the box, the mask and the keypoints of one annotation.

Shape shorthand in this module: H, W of the image in pixels.
"""

from math import isfinite
from typing import Any, Optional, Tuple, Union

from mgd_det.data.coco.problems import (
    BOX_OUTSIDE,
    BOX_STICKS_OUT,
    EMPTY_BOX,
    INVALID_BOX,
    INVALID_POLYGON,
    INVALID_RLE,
    WRONG_VALUE,
    short,
)

Size = Optional[Tuple[int, int]]  # (H, W), None where it is not known
Fault = Tuple[str, str, bool]  # kind, message, whether it breaks

_BORDER = 1  # pixels that a box may stick out without a word: tools round in different ways
# Pixels from the image's corner. Farther out, float32 is no longer exact to a part of a pixel, and pycocotools needs
# memory for each pixel along a polygon's edge.
_FARTHEST = 100_000
_MAX_SHIFT = 60  # bits of a count before its last five; pycocotools reads it into 64


def box_fault(box: Any, size: Size) -> Optional[Fault]:
    """The fault of a "bbox", which has to be [x, y, width, height] in pixels, or None.

    Boxes that stick out and empty boxes do not break: Detectron2 clips the former and drops the latter.
    """
    try:
        x, y, width, height = box
        finite = isfinite(x + y + width + height)
        if bool in map(type, box):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        return INVALID_BOX, f"bbox {short(box)} is not four numbers (x, y, width, height)", True
    if not finite:
        return INVALID_BOX, f"bbox {short(box)} is not finite", True
    if width < 0 or height < 0:
        return INVALID_BOX, f"bbox {short(box)} (x, y, width, height) has a negative width or height", True
    if max(abs(x), abs(y), width, height) > _FARTHEST:
        return INVALID_BOX, f"bbox {short(box)} reaches farther than {_FARTHEST} pixels", True
    if width == 0 or height == 0:
        return EMPTY_BOX, f"bbox {short(box)} (x, y, width, height) has no area", False
    if size is None:
        return None
    right, bottom, image_height, image_width = x + width, y + height, *size
    if x >= image_width or y >= image_height or right <= 0 or bottom <= 0:
        return BOX_OUTSIDE, f"bbox {short(box)} lies outside the image of {image_width} x {image_height}", True
    if x < -_BORDER or y < -_BORDER or right > image_width + _BORDER or bottom > image_height + _BORDER:
        return BOX_STICKS_OUT, f"bbox {short(box)} sticks out of the image of {image_width} x {image_height}", False
    return None


def mask_fault(segmentation: Any, size: Size) -> Optional[Fault]:
    """The fault of a "segmentation" that is not empty: a list of polygons or an RLE; or None.

    An invalid polygon beside valid ones does not break: Detectron2 drops it. Where none is valid it drops the object,
    even if only boxes are learned.
    """
    if isinstance(segmentation, list):
        return _polygons_fault(segmentation)
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, size)
    return INVALID_POLYGON, f"segmentation {short(segmentation)} is neither a list of polygons nor an RLE", True


def is_evaluable(segmentation: Any) -> bool:
    """Whether COCO's evaluator can read a mask without a breaking fault.

    pycocotools takes polygons by the first for what they are: of four numbers it is a box, of fewer nothing.
    """
    return not isinstance(segmentation, list) or len(segmentation[0]) > 4


def keypoints_fault(keypoints: Any) -> Optional[Fault]:
    """The fault of a "keypoints" that Detectron2's loader, which reads them in any use, cannot take, or None."""
    if not keypoints:
        return None
    if isinstance(keypoints, list) and len(keypoints) % 3 == 0 and all(_is_number(value) for value in keypoints):
        return None
    return WRONG_VALUE, f"keypoints {short(keypoints)} are not a list of numbers, three for each point", True


def _polygons_fault(polygons: list) -> Optional[Fault]:
    valid = 0
    for polygon in polygons:
        if not isinstance(polygon, list):
            return INVALID_POLYGON, f"polygon {short(polygon)} is not a list of numbers", True
        try:
            # One sum instead of a look at each number: COCO has some 60 million.
            finite, length = isfinite(sum(polygon)), len(polygon)
        except (TypeError, OverflowError):  # OverflowError: an integer larger than any float
            return INVALID_POLYGON, f"polygon {short(polygon)} is not a list of numbers", True
        if not finite:
            return INVALID_POLYGON, f"polygon {short(polygon)} has coordinates that are not finite", True
        if length and max(max(polygon), -min(polygon)) > _FARTHEST:
            return INVALID_POLYGON, f"polygon {short(polygon)} reaches farther than {_FARTHEST} pixels", True
        valid += length >= 6 and length % 2 == 0
    if valid == len(polygons):
        return None
    wanted = "three points or more, x and y of each"
    if valid == 0:
        return INVALID_POLYGON, f"segmentation {short(polygons)} has no valid polygon ({wanted})", True
    return INVALID_POLYGON, f"{len(polygons) - valid} of {len(polygons)} polygons are invalid ({wanted})", False


def _rle_fault(rle: dict, size: Size) -> Optional[Fault]:
    counts = rle.get("counts")
    try:
        height, width = rle["size"]
        pixels = height * width
        total = _compressed_length(counts) if isinstance(counts, str) else _plain_length(counts)
    except (KeyError, TypeError, ValueError) as error:
        return INVALID_RLE, f"RLE {short(rle)} cannot be decoded ({type(error).__name__}: {error})", True
    if size is not None and (height, width) != size:
        return INVALID_RLE, f"RLE has size (height, width) {short(rle['size'])}, the image {list(size)}", True
    if total != pixels:
        return INVALID_RLE, f"RLE of size {short(rle['size'])} has counts for {total} pixels", True
    return None


def _plain_length(counts: Any) -> Union[int, float]:
    if any(count < 0 or count % 1 for count in counts):
        raise ValueError("a count is no whole number >= 0")
    return sum(counts)


def _compressed_length(counts: str) -> int:
    """Number of pixels that COCO's compressed counts cover (pycocotools, rleFrString and rleToString of maskApi.c).

    Decoding them by pycocotools instead would trust them: it writes as many pixels as they say.
    """
    runs = [0, 0, 0]
    value = shift = 0
    for char in counts.encode("ascii"):
        char -= 48
        if not 0 <= char < 64:
            raise ValueError("foreign character in counts")
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


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _FARTHEST
