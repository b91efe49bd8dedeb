"""The images that an export is verified, calibrated and evaluated on."""

from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from PIL import Image

from mgd_det.cli.image_files import find_images
from mgd_det.data import check_dataset
from mgd_det.data.mapper import CheckedMapper
from mgd_det.errors import UserError
from mgd_det.export.postprocessing import read_image, resized_size

# By which the inputs of the verification are scaled, one after another: other sizes than the traced one.
_SCALES = (1.0, 0.8, 1.3, 0.6)
_SYNTHETIC_SIZES = ((240, 320), (150, 210), (384, 256), (97, 131))


def evenly(items: Sequence[Any], number: int) -> List[Any]:
    """Return at most ``number`` items, spread over all."""
    step = max(len(items) / number, 1)
    return [items[int(i * step)] for i in range(min(number, len(items)))]


def dataset_inputs(cfg: CfgNode, name: str, number: int) -> Iterator[Dict[str, Any]]:
    """Yield images of a registered data set as the detector takes them, spread over the set.

    Raises:
        UserError: the set is unknown, or it or an image is broken.
    """
    check_dataset(name)
    mapper = CheckedMapper(cfg, is_train=False)
    for entry in evenly(get_detection_dataset_dicts(name, filter_empty=False), number):
        mapped = mapper(entry)
        assert mapped is not None  # in evaluation a broken image is an error
        yield mapped


def verification_inputs(cfg: CfgNode, paths: Sequence[str], number: int) -> Tuple[List[Dict[str, Any]], str]:
    """Return images for the verification, scaled to different sizes, and what they are.

    Args:
        paths: files and folders; if there are none, the images of DATASETS.TEST, or else noise.
        number: of images at most; > 0.

    Raises:
        UserError: a path or an image cannot be read.
    """
    available = [name for name in cfg.DATASETS.TEST if is_there(name)]
    if paths:
        source = "--verify-images"
        files = [image.path for image in find_images(paths, source)]
    elif available:
        entries = get_detection_dataset_dicts(available[0], filter_empty=False)
        files, source = [entry["file_name"] for entry in entries], available[0]
    else:
        sizes = [_SYNTHETIC_SIZES[i % len(_SYNTHETIC_SIZES)] for i in range(number)]
        inputs = [scaled_input(cfg, _synthetic_image(*size, seed=i), 1.0) for i, size in enumerate(sizes)]
        return inputs, "synthetic pictures, since DATASETS.TEST has none here"
    inputs = []
    for i, path in enumerate(evenly(files, number)):
        try:
            image = read_image(path)
        except (OSError, ValueError) as e:
            raise UserError(f"{source}: {path} cannot be read as an image: {e}") from e
        inputs.append(scaled_input(cfg, image, _SCALES[i % len(_SCALES)]))
    return inputs, source


def scaled_input(cfg: CfgNode, image: np.ndarray, scale: float) -> Dict[str, Any]:
    """Return an image (H, W, 3) RGB as the detector takes it, scaled by the config's rule and by ``scale``."""
    size = resized_size(image.shape[0], image.shape[1], cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    height, width = (max(round(side * scale), 1) for side in size)
    pixels = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    if cfg.INPUT.FORMAT == "BGR":
        pixels = pixels[:, :, ::-1]
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return {"image": tensor, "height": image.shape[0], "width": image.shape[1]}


def is_there(name: str) -> bool:
    """Return whether a data set is registered and its files are on this machine."""
    if name not in DatasetCatalog:
        return False
    try:
        check_dataset(name)
        return True
    except UserError:
        return False


def _synthetic_image(height: int, width: int, seed: int) -> np.ndarray:
    """Return rectangles of random colours."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.integers(0, 256, 3), dtype=np.uint8)
    for _ in range(12):
        (y1, y2), (x1, x2) = (np.sort(rng.integers(0, side + 1, 2)) for side in (height, width))
        image[y1:y2, x1:x2] = rng.integers(0, 256, 3)
    return image
