"""Find and read the photos of Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv:1708.07747).

Shape shorthand in this module: N photos of a split (60 000 for "train", 10 000 for "test").
"""

import gzip
import logging
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import List, NamedTuple, Optional, Union

import numpy as np
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from mgd_det.errors import UserError

logger = logging.getLogger(__name__)

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PHOTO_SIDE = 28  # pixels
CLASS_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class FashionPhotos(NamedTuple):
    """The photos of one split.

    Attributes:
        images: (N, 28, 28) uint8, grey values 0 (the backdrop) to 255.
        labels: (N,) int64, indices into CLASS_NAMES.
    """

    images: np.ndarray
    labels: np.ndarray


def find_photo_folder(
    folder: Union[str, os.PathLike, None] = None, download_root: Union[str, os.PathLike] = "datasets"
) -> Path:
    """Find the folder of the four Fashion-MNIST files, or download them.

    If ``folder`` is given, only it is searched. Otherwise the places are, in this order, the folder of the Debian
    package dataset-fashion-mnist, an earlier download, and a new download by torchvision.

    Args:
        folder: the user's folder of the four files, with or without ".gz".
        download_root: where torchvision downloads to; it adds "FashionMNIST/raw" to it.

    Returns:
        A folder that has the four files.

    Raises:
        UserError: ``folder`` lacks a file, or there is no ``folder`` and the download fails.
    """
    if folder is not None:
        missing = _missing_files(Path(folder))
        if missing:
            raise UserError(
                f"The photo folder {str(folder)!r} has no file {', '.join(missing)}. Name a folder that "
                "holds the four .gz files of https://github.com/zalandoresearch/fashion-mnist."
            )
        return Path(folder)
    downloaded = Path(download_root) / "FashionMNIST" / "raw"
    for place in (DEBIAN_FOLDER, downloaded):
        if not _missing_files(place):
            return place
    logger.info(f"Downloading Fashion-MNIST to {downloaded}")
    try:
        FashionMNIST(str(download_root), download=True)
        reason = f"the download to {downloaded} is incomplete"
    except (OSError, RuntimeError) as error:
        reason = f"the download failed with {str(error)!r}"
    if _missing_files(downloaded):
        raise UserError(
            f"The Fashion-MNIST photos are not on this machine, and {reason}. Install the Debian package "
            f"(apt-get install {DEBIAN_PACKAGE}), or download the four .gz files of "
            "https://github.com/zalandoresearch/fashion-mnist into a folder DIR and pass --photos DIR."
        )
    return downloaded


def read_photos(folder: Union[str, os.PathLike], split: str) -> FashionPhotos:
    """Read one split.

    Args:
        folder: what :func:`find_photo_folder` returned.
        split: "train" or "test".

    Returns:
        Images (N, 28, 28) uint8 and labels (N,) int64.

    Raises:
        UserError: a file is missing, truncated or not an idx file of its kind.
    """
    assert split in _FILES, f'split is "train" or "test", got {split!r}'
    image_file, label_file = (_existing(Path(folder), name) for name in _FILES[split])
    if image_file is None or label_file is None:
        raise UserError(f"The photo folder {str(folder)!r} lacks {' or '.join(_FILES[split])} (.gz).")
    images = _read_idx(image_file, read_image_file)
    labels = _read_idx(label_file, read_label_file)
    if images.shape[1:] != (PHOTO_SIDE, PHOTO_SIDE) or not len(images):
        raise _damaged(image_file, f"its array has shape {images.shape}, not (N, 28, 28)")
    if len(labels) != len(images) or labels.max() >= len(CLASS_NAMES):
        raise _damaged(label_file, f"its labels do not fit the {len(images)} photos of {image_file.name}")
    return FashionPhotos(images, labels)


def _missing_files(folder: Path) -> List[str]:
    names = [name for pair in _FILES.values() for name in pair]
    return [name + ".gz" for name in names if _existing(folder, name) is None]


def _existing(folder: Path, name: str) -> Optional[Path]:
    return next((path for path in (folder / (name + ".gz"), folder / name) if path.is_file()), None)


def _read_idx(path: Path, reader) -> np.ndarray:
    # torchvision's reader takes the path of a file that is not compressed.
    try:
        with tempfile.NamedTemporaryFile(suffix=".idx") as plain:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as source:
                shutil.copyfileobj(source, plain)
            plain.flush()
            return reader(plain.name).numpy()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # What the reader raises for a wrong header, or if header and length disagree.
        raise _damaged(path, f"it is not a complete idx file ({error or type(error).__name__})") from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"Cannot read the Fashion-MNIST file {str(path)!r}: {reason}. Download it again.")
