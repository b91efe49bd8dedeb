"""The data sets as lists of entries: "file_name" or "image", and "label".

A set is looked for in ``root``, or without one in a folder of its own in $DETECTRON2_DATASETS (default: ./datasets). A
set that is not there is one UserError, which says what to download to where.
"""

import os
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils.file_io import PathManager
from torchvision.datasets import CIFAR100, ImageFolder

from mgd_det.data.fashion_scenes import find_photo_folder, read_photos
from mgd_det.errors import ArgumentError, UserError, check_choice, named_as

Entries = List[Dict[str, Any]]

PHOTO_SIDE = 28  # pixels of Fashion-MNIST
# Of the held-out part of CUB's training images: every tenth of a class.
HELD_OUT_EVERY = 10


def datasets_folder() -> Path:
    """Return the folder of all data sets, $DETECTRON2_DATASETS or ./datasets."""
    return Path(PathManager.get_local_path(os.environ.get("DETECTRON2_DATASETS", "datasets")))


def image_folder(split: str, root: str = "") -> Entries:
    """Return a split of ImageNet, or of any set with a folder for each class.

    Args:
        split: "train" or "val"; the folder of "val" may also be named "valid".
        root: has the folders of the splits; default: "imagenet" in :func:`datasets_folder`.

    Raises:
        UserError: the folder is not there, or has no images.
    """
    _check_split(split, ("train", "val"))
    folder = Path(root) if root else datasets_folder() / "imagenet"
    places = [folder / name for name in ((split,) if split == "train" else ("val", "valid"))]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise UserError(
            f"ImageNet's folder {places[0]} is not there: get ILSVRC2012 from https://image-net.org/download.php "
            f"(train and validation images), and put a folder of images for each class into {folder}/train and "
            f"{folder}/val"
        )
    try:
        samples = ImageFolder(str(place)).samples
    except (FileNotFoundError, OSError) as e:
        raise UserError(f"the folder {place} has no folders of images, one for each class: {e}") from e
    return [{"file_name": path, "label": label} for path, label in samples]


def cub(split: str, root: str = "") -> Entries:
    """Return a split of CUB-200-2011 (Wah et al., 2011): 5 994 images to train, 5 794 to test, 200 classes.

    Args:
        split: "train" or "test", as published; or two parts of the training images that choose an epoch without the
            test set: "held_out", every tenth image of a class, and "fit", the others.
        root: the folder CUB_200_2011; default: that in :func:`datasets_folder`.

    Raises:
        UserError: a file of the set is not there.
    """
    _check_split(split, ("train", "test", "fit", "held_out"))
    folder = Path(root) if root else datasets_folder() / "CUB_200_2011"
    tables = {}
    for name in ("images", "image_class_labels", "train_test_split"):
        try:
            lines = (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        except OSError as e:
            raise UserError(
                f"CUB-200-2011 has no {folder / name}.txt: get CUB_200_2011.tgz from "
                f"https://data.caltech.edu/records/65de6-vp158 and unpack it into {folder.parent}"
            ) from e
        tables[name] = dict(line.split(maxsplit=1) for line in lines if line.strip())
    entries, seen = [], {}
    for number, path in tables["images"].items():
        is_train = tables["train_test_split"][number] == "1"
        label = int(tables["image_class_labels"][number]) - 1
        part = "test"
        if is_train:
            seen[label] = seen.get(label, 0) + 1
            part = "held_out" if seen[label] % HELD_OUT_EVERY == 0 else "fit"
        if split == part or (split == "train" and is_train):
            entries.append({"file_name": str(folder / "images" / path), "label": label})
    return entries


def cifar100(split: str, root: str = "") -> Entries:
    """Return a split of CIFAR-100 (Krizhevsky, 2009), in memory: 50 000 images to train, 10 000 to test.

    Args:
        split: "train" or "test".
        root: has the folder cifar-100-python; default: :func:`datasets_folder`.

    Raises:
        UserError: the set is not there.
    """
    _check_split(split, ("train", "test"))
    folder = Path(root) if root else datasets_folder()
    try:
        data = CIFAR100(str(folder), train=split == "train", download=False)
    except (RuntimeError, OSError) as e:
        raise UserError(
            f"CIFAR-100 is not complete in {folder / 'cifar-100-python'}: unpack "
            f"https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz into {folder}"
        ) from e
    return [{"image": image, "label": int(label)} for image, label in zip(data.data, data.targets)]


def fashion_mnist(split: str, images: int = 0, side: int = 28, root: str = "") -> Entries:
    """Return a split of Fashion-MNIST (arXiv:1708.07747), in memory: 60 000 images to train, 10 000 to test.

    Args:
        split: "train" or "test".
        images: the first so many of them; 0 for all.
        side: of the images in pixels, > 0; those of 28 x 28 are scaled bilinearly.
        root: folder of its four files; default: that of Debian's package dataset-fashion-mnist, or a download to
            :func:`datasets_folder`.

    Raises:
        UserError: the set is not there and cannot be downloaded, or ``images`` or ``side`` is not as above.
    """
    _check_split(split, ("train", "test"))
    with named_as(_key):
        if images < 0:
            raise ArgumentError("images", f"is {images}; give a number >= 0")
        if side < 1:
            raise ArgumentError("side", f"is {side}; give a number > 0")
    photos = read_photos(find_photo_folder(root or None, datasets_folder()), split)
    number = images or len(photos.labels)
    pixels = photos.images[:number]
    if side != PHOTO_SIDE:
        maps = torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1)
        scaled = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
        pixels = scaled.round().squeeze(1).to(torch.uint8).numpy()
    return [{"image": image, "label": int(label)} for image, label in zip(pixels, photos.labels)]


def _check_split(split: str, splits: Sequence[str]) -> None:
    with named_as(_key):
        check_choice("split", split, splits)


def _key(argument: str) -> str:
    return f"dataloader.train.dataset.{argument} (or that of dataloader.test or dataloader.matching)"
