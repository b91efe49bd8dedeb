"""What both readers share: a split of a data set in COCO's terms, its images, and a list of bad lines."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from PIL import Image

from mgd_det.data.categories import numbered_categories
from mgd_det.errors import UserError, first_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

_SHOWN = 10  # bad lines in one message
_EXIF_ORIENTATION, _TURNED = 274, (5, 6, 7, 8)  # by 90 degrees


class BadLines:
    """Collects what is wrong with the files of a data set, so that one message can show it."""

    def __init__(self) -> None:
        self.lines: List[str] = []

    def add(self, path: Path, line: int, problem: str) -> None:
        """Note a problem of a line; line 0 stands for the whole file."""
        self.lines.append(f"{path}{f', line {line}' if line else ''}: {problem}")

    def refuse(self) -> None:
        """Refuse the data set if there are problems.

        Raises:
            UserError: it counts them and shows the first ones.
        """
        if self.lines:
            more = [f"... and {len(self.lines) - _SHOWN} more"] if len(self.lines) > _SHOWN else []
            shown = "\n".join(f"  {line}" for line in [*self.lines[:_SHOWN], *more])
            raise UserError(f"{len(self.lines)} problems; correct or delete these lines, nothing was written:\n{shown}")


@dataclass
class CocoSplit:
    """One split of a data set, in COCO's terms. Category i + 1 is class i.

    Attributes:
        name: "train", "val"...
        image_root: the folder to which file names are relative.
        images: entries of "images".
        annotations: entries of "annotations".
    """

    name: str
    image_root: Path
    images: List[Dict[str, Any]] = field(default_factory=list)
    annotations: List[Dict[str, Any]] = field(default_factory=list)

    def add_image(self, path: Path, bad: BadLines) -> Optional[Tuple[int, int]]:
        """Add an image; return its height and width as training sees it, or None if it cannot be read."""
        try:
            with Image.open(path) as image:
                width, height = image.size
                # Of a PNG without EXIF data before its pixels, getexif() would read all pixels.
                may_turn = image.format != "PNG" or "exif" in image.info
                if may_turn and image.getexif().get(_EXIF_ORIENTATION) in _TURNED:
                    width, height = height, width
        except Exception as e:  # PIL raises many types for broken files
            bad.add(path, 0, f"cannot be read as an image ({type(e).__name__}: {first_line(e)})")
            return None
        name = Path(os.path.relpath(path, self.image_root)).as_posix()
        self.images.append({"id": len(self.images) + 1, "file_name": name, "height": height, "width": width})
        return height, width

    def add_object(
        self,
        label: int,
        box: Sequence[float],
        polygon: Optional[Sequence[float]] = None,
        iscrowd: bool = False,
        **more: Any,
    ) -> None:
        """Add an object of the image that was added last.

        Args:
            label: class index.
            box: x0, y0, x1, y1 in pixels; it is cut at the border of the image.
            polygon: x, y, x, y... of its mask, if it has one.
            iscrowd: whether training and evaluation ignore it.
            more: other keys of the entry.
        """
        image = self.images[-1]
        limits = (image["width"], image["height"]) * 2
        x0, y0, x1, y1 = (min(max(value, 0.0), limit) for value, limit in zip(box, limits))
        entry: Dict[str, Any] = {"id": len(self.annotations) + 1, "image_id": image["id"], "category_id": label + 1}
        entry.update(bbox=[x0, y0, x1 - x0, y1 - y0], area=(x1 - x0) * (y1 - y0), iscrowd=int(iscrowd), **more)
        if polygon is not None:
            entry.update(segmentation=[list(polygon)], area=polygon_area(polygon))
        self.annotations.append(entry)

    def content(self, classes: Sequence[str]) -> Dict[str, Any]:
        """Return the json's content.

        Args:
            classes: names by class index.
        """
        return {
            "images": self.images,
            "annotations": self.annotations,
            "categories": numbered_categories(classes),
        }


def polygon_area(polygon: Sequence[float]) -> float:
    """Return the area of a polygon x, y, x, y... in square pixels (shoelace formula)."""
    xs, ys = polygon[::2], polygon[1::2]
    pairs = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]])
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in pairs)) / 2
