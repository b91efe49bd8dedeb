"""The images of files and folders that a command line names."""

import os
from pathlib import Path
from typing import Iterator, List, NamedTuple, Sequence

from mgd_det.data.conversion.coco_split import IMAGE_SUFFIXES
from mgd_det.errors import UserError

SUFFIXES = (*IMAGE_SUFFIXES, ".ppm", ".pgm", ".gif")


class InputImage(NamedTuple):
    """An image to look at.

    Attributes:
        path: of the file.
        name: the path without the folder that the user gave; if two were equal, without the folder that all images
            have in common.
    """

    path: str
    name: str


def find_images(paths: Sequence[str], argument: str, recursive: bool = False, advice: str = "") -> List[InputImage]:
    """Return the images of files and folders: files as they are given, those of a folder sorted by name.

    Args:
        paths: files and folders.
        argument: what the command line calls them, for the errors.
        recursive: whether to look into the folders of folders too.
        advice: the end of the error for paths without an image.

    Raises:
        UserError: a path does not exist, or there is no image.
    """
    images = [image for path in paths for image in _images_below(path, argument, recursive)]
    if not images:
        raise UserError(f"{argument} {', '.join(paths)} has no image: give files of {', '.join(SUFFIXES)}{advice}")
    names = [image.name for image in images]
    if len(set(names)) < len(names):  # of two folders, or of "a/1.jpg" and "b/1.jpg"
        common = os.path.commonpath([os.path.dirname(os.path.abspath(image.path)) for image in images])
        return [InputImage(image.path, Path(os.path.relpath(image.path, common)).as_posix()) for image in images]
    return images


def _images_below(path: str, argument: str, recursive: bool) -> Iterator[InputImage]:
    if os.path.isfile(path):
        yield InputImage(path, os.path.basename(path))
        return
    if not os.path.isdir(path):
        raise UserError(f"{argument} {path} does not exist: give image files or folders of them")
    found = Path(path).rglob("*") if recursive else Path(path).iterdir()
    for file in sorted(file for file in found if file.suffix.lower() in SUFFIXES and file.is_file()):
        yield InputImage(str(file), file.relative_to(path).as_posix())
