"""What runs before and after an exported detector, in numpy and Pillow alone: copy this file into your product.

``projects/Deploy/detect.py`` is an example of its use. Everything that depends on the detector is in the model's
metadata, a json that :func:`read_settings` reads. Results are those of Detectron2 in float32.

Shape shorthand in this module: N detections, A anchors at each cell of a level, K classes, H and W cells or pixels,
M cells at each side of a mask.
"""

import json
import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageOps

SETTINGS_KEY = "mgd_det"  # of the model's metadata
VERSION = 1  # of the settings

Settings = Dict[str, Any]


class Detections(NamedTuple):
    """The objects in an image, the most probable first.

    Attributes:
        boxes: (N, 4) float32, x1, y1, x2, y2 in the pixels of the image.
        scores: (N,) float32.
        classes: (N,) int64, indices into "classes" and "category_ids" of the settings.
        masks: (N, H, W) bool, or None if the detector has none.
        keypoints: (N, points, 3) float32, x, y and score, or None if the detector has none.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: Optional[np.ndarray] = None
    keypoints: Optional[np.ndarray] = None


def read_settings(text: str) -> Settings:
    """Parse the json of the model's metadata.

    Raises:
        ValueError: it is of a version that this file cannot read.
    """
    settings = json.loads(text)
    if settings["version"] != VERSION:
        raise ValueError(f"the model's settings have version {settings['version']}; this file reads {VERSION}")
    return settings


def read_image(path: Any) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than 8 bits per channel, which Pillow would cut off at 255.
    """
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"PIL mode {image.mode!r} has more than 8 bits per channel; convert it to 8 bits")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def network_input(image: np.ndarray, settings: Settings) -> Tuple[np.ndarray, Tuple[int, int]]:
    """Prepare an image for the network.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        The network's input (:func:`as_input`), and height and width of the resized image.
    """
    height, width = resized_size(image.shape[0], image.shape[1], settings["min_size"], settings["max_size"])
    if (height, width) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    if settings["channel_order"] == "BGR":
        image = image[:, :, ::-1]
    return as_input(image.transpose(2, 0, 1), settings), (height, width)


def resized_size(height: int, width: int, min_size: int, max_size: int) -> Tuple[int, int]:
    """Return the size of which the shorter side is ``min_size``, or less if the longer one would exceed ``max_size``.

    A ``min_size`` of 0 keeps the size.
    """
    if min_size == 0:
        return height, width
    scale = min_size / min(height, width)
    new_height, new_width = (min_size, scale * width) if height < width else (scale * height, min_size)
    longer = max(new_height, new_width)
    if longer > max_size:
        new_height, new_width = (side * (max_size / longer) for side in (new_height, new_width))
    return int(new_height + 0.5), int(new_width + 0.5)


def as_input(pixels: np.ndarray, settings: Settings) -> np.ndarray:
    """Normalise and pad resized pixels, as far as the network does not do it itself.

    Args:
        pixels: (3, H, W), 0 to 255, in the network's channel order.

    Returns:
        (1, 3, H', W') float32 for the core of a detector, (3, H, W) float32 for a whole one.
    """
    pixels = pixels.astype(np.float32)
    if settings["kind"] == "whole":
        return pixels
    mean, std = (np.array(settings[key], np.float32).reshape(-1, 1, 1) for key in ("pixel_mean", "pixel_std"))
    step = settings["size_divisibility"]
    missing = [-side % step for side in pixels.shape[1:]]
    return np.pad((pixels - mean) / std, [(0, 0), (0, missing[0]), (0, missing[1])])[None]


def detections(
    outputs: Sequence[np.ndarray], settings: Settings, input_size: Sequence[int], image_size: Sequence[int]
) -> Detections:
    """Turn the network's outputs for one image into its objects.

    Args:
        outputs: of the network, in its order. Those of a core have a first axis of length 1.
        input_size: height and width of the resized image, without padding.
        image_size: height and width of the image, to which boxes are scaled.
    """
    if settings["kind"] == "whole":
        fields = dict(zip(settings["outputs"], outputs))
        boxes, scores, classes = (fields[name] for name in ("pred_boxes", "scores", "pred_classes"))
        masks, heatmaps = fields.get("pred_masks"), fields.get("pred_keypoint_heatmaps")
        keypoints = None if heatmaps is None else find_keypoints(heatmaps, boxes)
    else:
        boxes, scores, classes = _dense_detections([output[0] for output in outputs], settings)
        masks, keypoints = None, None
    scale = [image_size[1] / input_size[1], image_size[0] / input_size[0]]
    boxes = boxes.astype(np.float32) * np.array([*scale, *scale], dtype=np.float32)
    boxes = np.clip(boxes, 0, np.array([image_size[1], image_size[0]] * 2, dtype=np.float32))
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes = boxes[kept]
    return Detections(
        boxes,
        scores[kept],
        classes[kept].astype(np.int64),
        None if masks is None else paste_masks(masks[kept, 0], boxes, image_size),
        None if keypoints is None else keypoints[kept] * np.array([*scale, 1], dtype=np.float32),
    )


def class_wise_nms(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, threshold: float, most: int
) -> np.ndarray:
    """Choose boxes greedily by score, without those that overlap a chosen one of their class.

    Args:
        boxes: (N, 4) x1, y1, x2, y2.
        threshold: the largest intersection over union of two chosen boxes of a class.
        most: number of boxes to choose at most.

    Returns:
        The indices of the chosen boxes by falling score; the first of equal ones comes first.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, classes = boxes[order], classes[order]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    chosen: List[int] = []
    alive = np.ones(len(order), dtype=bool)
    for i in range(len(order)):
        if len(chosen) == most:
            break
        if not alive[i]:
            continue
        chosen.append(i)
        others = i + 1 + np.flatnonzero(alive[i + 1 :] & (classes[i + 1 :] == classes[i]))
        sides = np.minimum(boxes[i, 2:], boxes[others, 2:]) - np.maximum(boxes[i, :2], boxes[others, :2])
        overlap = np.prod(np.maximum(sides, 0), axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0 of two empty boxes is no overlap
            alive[others[overlap / (areas[i] + areas[others] - overlap) > threshold]] = False
    return order[chosen]


def paste_masks(masks: np.ndarray, boxes: np.ndarray, image_size: Sequence[int]) -> np.ndarray:
    """Draw masks of boxes into the image by bilinear interpolation.

    Args:
        masks: (N, M, M), probabilities in each box.
        boxes: (N, 4) in the pixels of the image.

    Returns:
        (N, H, W) bool: where the probability is at least 0.5.
    """
    pasted = np.zeros((len(masks), *image_size), dtype=bool)
    for mask, (x1, y1, x2, y2), out in zip(masks, boxes, pasted):
        rows = _interpolation(y1, y2, mask.shape[0], image_size[0])
        columns = _interpolation(x1, x2, mask.shape[1], image_size[1])
        out[:] = rows @ mask @ columns.T >= 0.5
    return pasted


def find_keypoints(heatmaps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Find the largest value of each heatmap, after bicubic interpolation to the pixels of its box.

    Args:
        heatmaps: (N, points, M, M) logits.
        boxes: (N, 4) in the pixels of the network's input.

    Returns:
        (N, points, 3) x, y in these pixels, and the score.
    """
    found = np.zeros((*heatmaps.shape[:2], 3), dtype=np.float32)
    for maps, (x1, y1, x2, y2), out in zip(heatmaps, boxes, found):
        width, height = max(x2 - x1, 1), max(y2 - y1, 1)
        columns, rows = math.ceil(width), math.ceil(height)
        resized = _bicubic(maps.shape[1], rows) @ maps @ _bicubic(maps.shape[2], columns).T
        y, x = np.divmod(resized.reshape(len(maps), -1).argmax(axis=1), columns)
        largest = resized.max(axis=(1, 2), keepdims=True)
        out[:, 0], out[:, 1] = x1 + (x + 0.5) * (width / columns), y1 + (y + 0.5) * (height / rows)
        out[:, 2] = 1 / np.exp(maps - largest).sum(axis=(1, 2))
    return found


def _dense_detections(outputs: Sequence[np.ndarray], settings: Settings) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the boxes in the pixels of the network's input, scores and classes, after NMS.

    Args:
        outputs: logits (A * K, H, W) of every level, then deltas (A * 4, H, W), then FCOS's centerness (1, H, W).
    """
    levels = len(settings["strides"])
    parts = [outputs[i * levels : (i + 1) * levels] for i in range(len(outputs) // levels)]
    found = [_level_detections(level, [part[level] for part in parts], settings) for level in range(levels)]
    boxes, scores, classes = (np.concatenate(field) for field in zip(*found))
    chosen = class_wise_nms(boxes, scores, classes, settings["nms_threshold"], settings["max_detections"])
    return boxes[chosen], scores[chosen], classes[chosen]


def _level_detections(
    level: int, outputs: Sequence[np.ndarray], settings: Settings
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return boxes, scores and classes of one level's best candidates."""
    threshold, cell_anchors = settings["score_threshold"], np.array(settings["cell_anchors"][level], np.float32)
    number, width = len(cell_anchors), outputs[0].shape[2]
    logits, deltas, *centerness = (_by_anchor(output, number) for output in outputs)
    # A score is at most the root of its class probability (FCOS), so most logits need no sigmoid.
    least = threshold**2 if centerness else threshold
    rows, classes = np.nonzero(logits > (math.log(least / (1 - least)) - 1e-3 if 0 < least < 1 else -np.inf))
    scores = _sigmoid(logits[rows, classes])
    if centerness:
        scores = np.sqrt(scores * _sigmoid(centerness[0][rows, 0]))
    candidates = np.flatnonzero(scores > threshold)
    best = candidates[np.argsort(-scores[candidates], kind="stable")[: settings["candidates_per_level"]]]
    rows, scores, classes = rows[best], scores[best], classes[best]
    y, x = np.divmod(rows // number, width)
    centers = (np.stack([x, y], axis=1) + np.float32(settings["anchor_offset"])) * settings["strides"][level]
    anchors = cell_anchors[rows % number] + np.tile(centers, 2).astype(np.float32)
    return _decode(deltas[rows], anchors, settings), scores, classes


def _by_anchor(output: np.ndarray, number: int) -> np.ndarray:
    """Return (A * K, H, W) as (H * W * A, K)."""
    height, width = output.shape[1:]
    return output.reshape(number, -1, height, width).transpose(2, 3, 0, 1).reshape(height * width * number, -1)


def _decode(deltas: np.ndarray, anchors: np.ndarray, settings: Settings) -> np.ndarray:
    """Return the boxes (N, 4) that deltas make of anchors."""
    sizes = anchors[:, 2:] - anchors[:, :2]
    if settings["kind"] == "fcos":
        distances = np.maximum(deltas, 0) * np.tile(sizes, 2)
        centers = 0.5 * (anchors[:, :2] + anchors[:, 2:])
        return np.concatenate([centers - distances[:, :2], centers + distances[:, 2:]], axis=1)
    deltas = deltas / np.array(settings["box_weights"], np.float32)
    centers = deltas[:, :2] * sizes + (anchors[:, :2] + 0.5 * sizes)
    half = 0.5 * np.exp(np.minimum(deltas[:, 2:], np.float32(settings["scale_clamp"]))) * sizes
    return np.concatenate([centers - half, centers + half], axis=1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) is infinite and the result 0
        return 1 / (1 + np.exp(-x))


def _interpolation(start: float, end: float, cells: int, pixels: int) -> np.ndarray:
    """Return the weights (pixels, cells) with which the centers of pixels see cells that lie from start to end."""
    positions = (np.arange(pixels, dtype=np.float32) + 0.5 - start) / (end - start) * cells - 0.5
    return np.maximum(1 - np.abs(positions[:, None] - np.arange(cells, dtype=np.float32)), 0)


def _bicubic(cells: int, pixels: int) -> np.ndarray:
    """Return the weights (pixels, cells) of torch's bicubic interpolation."""
    a = -0.75
    positions = (np.arange(pixels) + 0.5) * (cells / pixels) - 0.5
    first = np.floor(positions).astype(int)
    weights = np.zeros((pixels, cells), dtype=np.float32)
    for offset in (-1, 0, 1, 2):
        d = np.abs(positions - first - offset)
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, a * (((d - 5) * d + 8) * d - 4)
        np.add.at(weights, (np.arange(pixels), np.clip(first + offset, 0, cells - 1)), np.where(d <= 1, near, far))
    return weights
