"""What can be wrong with a data set in COCO's format."""

from reprlib import Repr
from typing import NamedTuple, Union

UNREADABLE_JSON = "unreadable json"
WRONG_SHAPE = "wrong shape"
MISSING_KEY = "missing key"
WRONG_VALUE = "wrong value"
DUPLICATE_ID = "duplicate id"
DUPLICATE_FILE = "duplicate file name"
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
WRONG_SIZE = "wrong image size"

# Of the mask only: the object's box is right.
MASK_KINDS = (INVALID_POLYGON, INVALID_RLE)

_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}

_short = Repr()
_short.maxlist = _short.maxdict = 6
_short.maxother = _short.maxstring = 60


def short(value: object) -> str:
    """``repr`` of a value of the json, cut where it is long."""
    return _short.repr(value)


class Problem(NamedTuple):
    """Something that is wrong with a data set.

    Attributes:
        kind: one of the names above.
        file: the image, or the json.
        entry: id of the image, annotation or category; None where it has none.
        message: what is wrong, without the entry.
        breaks: whether training or evaluation is refused for it. Where it is False, Detectron2 copes with it; it may
            happen in COCO itself.
        part: the list of the json that the entry is in ("images", "annotations" or "categories"), "" for the whole.
        place: its index there.
    """

    kind: str
    file: str
    entry: Union[int, float, str, None]
    message: str
    breaks: bool = True
    part: str = ""
    place: int = -1

    @property
    def is_fatal(self) -> bool:
        """Whether the set cannot be used by leaving the entry out."""
        return self.breaks and self.part not in ("images", "annotations")

    def __str__(self) -> str:
        if not self.part:
            return self.message
        if self.entry is None:
            return f"entry {self.place} of {self.part!r}: {self.message}"
        return f"{_SINGULAR[self.part]} {self.entry!s:.60}: {self.message}"
