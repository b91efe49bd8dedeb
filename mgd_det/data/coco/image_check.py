"""Finds images of a data set that are missing, empty or broken."""

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

from detectron2.data.detection_utils import read_image

from mgd_det.data.coco.check import ImageFile
from mgd_det.data.coco.problems import EMPTY_IMAGE, MISSING_IMAGE, UNREADABLE_IMAGE, WRONG_SIZE, Problem

_STAT_SECONDS = 10  # for the sizes of all files
_AHEAD = 1000  # images that wait for a thread


def absent_images(image_root: str, images: Iterable[ImageFile]) -> List[Problem]:
    """Images that are not there or have no byte.

    Each folder is listed once. Sizes are looked at for ten seconds at most, which a network's file system may need
    for thousands of files.
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
            kind, what = (MISSING_IMAGE, "is not there") if size is None else (EMPTY_IMAGE, "has no byte")
            problems.append(_problem(image_root, image, kind, f"{path!r} {what}"))
    return problems


def broken_images(
    image_root: str,
    images: Iterable[ImageFile],
    known: Iterable[Problem] = (),
    *,
    workers: Optional[int] = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> List[Problem]:
    """Reads every image, as training does, and returns those that cannot be read or have another size.

    Args:
        images: with the sizes that the json gives, which count after the EXIF orientation is applied.
        known: problems of images that need not be read any more.
        workers: threads; default: one for each CPU.
        progress: is called with the number of images that were read, and of all.
    """
    problems: List[Problem] = []
    told = {problem.place for problem in known if problem.part == "images"}
    images = [image for image in images if image.place not in told]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        done, waiting = 0, iter(images)
        # Not all at once: a pool keeps what it was given and what it returned.
        while chunk := list(itertools.islice(waiting, _AHEAD)):
            for image, fault in zip(chunk, pool.map(lambda image: _image_fault(image_root, image), chunk)):
                if fault:
                    problems.append(_problem(image_root, image, *fault))
                done += 1
                progress(done, len(images))
    return problems


def reading_fault(record: Dict[str, Any]) -> Optional[Tuple[str, str]]:
    """Why an image cannot be used.

    Args:
        record: its "file_name" and, where they are known, "height" and "width", as in Detectron2's dataset dicts.

    Returns:
        None where it can; otherwise kind and message of the problem.
    """
    path = record["file_name"]
    try:
        shape = read_image(path, "RGB").shape
    except Exception as error:  # PIL raises many types for broken files
        return UNREADABLE_IMAGE, f"{path!r} cannot be read ({type(error).__name__}: {error})"
    height, width = record.get("height", shape[0]), record.get("width", shape[1])
    if shape[:2] != (height, width):
        found = f"{shape[1]} x {shape[0]} (width x height, after its EXIF orientation)"
        return WRONG_SIZE, f"{path!r} has {found}, the json says {width} x {height}"
    return None


def _image_fault(image_root: str, image: ImageFile) -> Optional[Tuple[str, str]]:
    path = os.path.join(image_root, image.file_name)
    return reading_fault({"file_name": path, "height": image.height, "width": image.width})


def _problem(image_root: str, image: ImageFile, kind: str, message: str) -> Problem:
    path = os.path.join(image_root, image.file_name)
    return Problem(kind, path, image.id, message, part="images", place=image.place)


def _listing(folder: str) -> Dict[str, os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return {}


def _size(file: os.DirEntry) -> Optional[int]:
    """Bytes of a file; None for a link to nowhere."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None
    except OSError:  # no right to look; reading it will tell
        return 1
