"""Find images of a data set that are missing, empty or broken."""

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterable, List, Optional

from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image

from mgd_det.data.coco.check import ImageFile
from mgd_det.data.coco.problems import DEEP_IMAGE, EMPTY_IMAGE, MISSING_IMAGE, UNREADABLE_IMAGE, WRONG_SIZE, Problem

_STAT_SECONDS = 10  # for the sizes of all files
_AHEAD = 1000  # images that wait for a thread


def absent_images(image_root: str, images: Iterable[ImageFile]) -> List[Problem]:
    """Find images that do not exist or are empty.

    Each folder is listed once. Sizes are checked for ten seconds at most: a network file system may need longer for
    thousands of files.
    """
    problems: List[Problem] = []
    there: Dict[str, Dict[str, os.DirEntry]] = {}
    deadline = time.monotonic() + _STAT_SECONDS
    for image in images:
        folder, base = os.path.split(image.file_name)
        if folder not in there:
            there[folder] = _listing(os.path.join(image_root, folder))
        file = there[folder].get(base)
        size = None if file is None else _size(file) if time.monotonic() < deadline else 1
        if not size:
            path = os.path.join(image_root, image.file_name)
            kind, what = (MISSING_IMAGE, "does not exist") if size is None else (EMPTY_IMAGE, "is empty")
            problems.append(_of_image(Problem(kind, f"{path!r} {what}"), image_root, image))
    return problems


def broken_images(
    image_root: str,
    images: Iterable[ImageFile],
    known: Iterable[Problem] = (),
    *,
    workers: Optional[int] = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> List[Problem]:
    """Read every image, as training does, and find those that are broken.

    An image is broken if it cannot be read, has another size than the json says, or has more than 8 bits per channel.

    Args:
        image_root: folder of the images.
        images: with the sizes that the json gives; they apply after the EXIF orientation.
        known: problems of images that need not be read again.
        workers: number of threads; one for each CPU by default.
        progress: called with the number of images read so far, and the number of all.

    Returns:
        The problems, in the order of ``images``.
    """
    problems: List[Problem] = []
    skipped = {problem.place for problem in known if problem.part == "images"}
    images = [image for image in images if image.place not in skipped]

    def check(image: ImageFile) -> Optional[Problem]:
        path = os.path.join(image_root, image.file_name)
        return reading_problem({"file_name": path, "height": image.height, "width": image.width})

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        done, waiting = 0, iter(images)
        # In chunks: a pool keeps all that it was given and has returned.
        while chunk := list(itertools.islice(waiting, _AHEAD)):
            for image, problem in zip(chunk, pool.map(check, chunk)):
                if problem:
                    problems.append(_of_image(problem, image_root, image))
                done += 1
                progress(done, len(images))
    return problems


def reading_problem(record: Dict[str, Any]) -> Optional[Problem]:
    """Read an image, and return why it cannot be used, or None.

    Args:
        record: its "file_name" and, where they are known, "height" and "width", as in Detectron2's dataset dicts.
    """
    path = record["file_name"]
    try:
        shape = read_image(path, "RGB").shape
    except Exception as error:  # PIL raises many types for broken files
        return Problem(UNREADABLE_IMAGE, f"{path!r} cannot be read ({type(error).__name__}: {error})")
    height, width = record.get("height", shape[0]), record.get("width", shape[1])
    if shape[:2] != (height, width):
        found = f"{shape[1]} x {shape[0]} (width x height, after its EXIF orientation)"
        return Problem(WRONG_SIZE, f"{path!r} has {found}, the json says {width} x {height}")
    return mode_problem(path)


def mode_problem(path: str) -> Optional[Problem]:
    """Return a problem if an image has more than 8 bits per channel; only its header is read.

    Pillow cuts the values of such images off at 255 when Detectron2 converts them to RGB.

    Raises:
        Exception: the image cannot be read.
    """
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        mode = image.mode
    if mode[0] not in "IF":  # "I", "F", "I;16" and its variants; 16-bit colour images are opened as "RGB"
        return None
    return Problem(
        DEEP_IMAGE,
        f"{path!r} has PIL mode {mode!r}, whose values above 255 would be lost: convert it to 8 bits (mode 'L')",
    )


def _of_image(problem: Problem, image_root: str, image: ImageFile) -> Problem:
    path = os.path.join(image_root, image.file_name)
    return problem._replace(file=path, entry=image.id, part="images", place=image.place)


def _listing(folder: str) -> Dict[str, os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return {}


def _size(file: os.DirEntry) -> Optional[int]:
    """Return the bytes of a file; None for a link to nowhere."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None
    except OSError:  # no permission for it; reading the image will show
        return 1
