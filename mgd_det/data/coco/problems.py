"""What can be wrong with a data set in COCO's format."""

from reprlib import Repr
from typing import NamedTuple, Union

UNREADABLE_JSON = "unreadable json"
WRONG_SHAPE = "wrong shape"
MISSING_KEY = "missing key"
WRONG_VALUE = "wrong value"
DUPLICATE_ID = "duplicate id"
DUPLICATE_CLASS = "duplicate class name"
UNKNOWN_IMAGE = "unknown image"
UNKNOWN_CATEGORY = "unknown category"
INVALID_BOX = "invalid box"
BOX_OUTSIDE = "box outside the image"
BOX_STICKS_OUT = "box sticks out of the image"
EMPTY_BOX = "empty box"
INVALID_POLYGON = "invalid polygon"
INVALID_RLE = "invalid RLE"
ID_ZERO = "annotation id 0"
MISSING_IMAGE = "missing image"
EMPTY_IMAGE = "empty image file"
UNREADABLE_IMAGE = "unreadable image"
DEEP_IMAGE = "image of more than 8 bits"
WRONG_SIZE = "wrong image size"

# Problems of the mask only: the object's box is correct.
MASK_KINDS = (INVALID_POLYGON, INVALID_RLE)

_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}

_short = Repr()
_short.maxlist = _short.maxdict = 6
_short.maxother = _short.maxstring = 60


def short(value: object) -> str:
    """Return the ``repr`` of a value of the json, shortened if it is long."""
    return _short.repr(value)


class Problem(NamedTuple):
    """Something that is wrong with a data set.

    Attributes:
        kind: one of the names above.
        message: what is wrong, without the entry.
        breaks: whether training or evaluation is refused because of it. If False, Detectron2 can handle it; it may
            occur in COCO itself.
        file: the image, or the json.
        entry: id of the image, annotation or category; None if it has none.
        part: the list of the json with the entry ("images", "annotations" or "categories"); "" for the whole json.
        place: index of the entry in that list.
    """

    kind: str
    message: str
    breaks: bool = True
    file: str = ""
    entry: Union[int, float, str, None] = None
    part: str = ""
    place: int = -1

    @property
    def is_fatal(self) -> bool:
        """Whether the set is unusable even without the entry."""
        return self.breaks and self.part not in ("images", "annotations")

    def __str__(self) -> str:
        if not self.part:
            return self.message
        if self.entry is None:
            return f"entry {self.place} of {self.part!r}: {self.message}"
        return f"{_SINGULAR[self.part]} {self.entry!s:.60}: {self.message}"
