"""Predictions of several models on the same images, side by side.

Shape shorthand in this module: H, W of an image; h, w of its tile in the picture; R objects of one image.
"""

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
from detectron2.structures import BoxMode, Instances
from detectron2.utils.colormap import colormap

from mgd_det.visualization.figures import Output, save_figure

Annotations = List[Dict[str, Any]]
Objects = Union[Instances, Annotations]

_GAP, _HEADER = 6, 30  # pixels between tiles; height of the line with the columns' titles
_MASK_ALPHA = 0.4


def class_color(label: int) -> Tuple[float, float, float]:
    """Return the RGB color in [0, 1] of a class index; the colors repeat after Detectron2's color map."""
    colors = colormap(rgb=True, maximum=1)
    return tuple(colors[label % len(colors)].tolist())


def draw_predictions(
    columns: Mapping[str, Sequence[Objects]],
    images: Sequence[np.ndarray],
    class_names: Sequence[str],
    output: Output,
    score_threshold: float = 0.3,
    tile_size: int = 384,
    show_masks: bool = True,
) -> str:
    """Draw one row for each image and one column for each model, by Detectron2's Visualizer.

    Args:
        columns: title of each column, from left to right (usually the ground truth first) -> what to draw on each
            image: Instances, predicted or of the ground truth, or annotations as in Detectron2's dataset dicts. Their
            boxes and masks refer to the size of the image here.
        images: (H, W, 3) uint8 RGB each; their sizes may differ.
        class_names: by class index.
        output: PNG to write, a path or a binary file.
        score_threshold: predictions with a lower score are not drawn, in [0, 1].
        tile_size: every image is scaled so that its longer side has this many pixels.
        show_masks: draw masks, if there are any.

    Returns:
        The path of the picture. It is ``len(columns)`` tiles wide, with 6 pixels around each.

    Raises:
        ValueError: there is no column or image, or a column does not have one entry for each image.
    """
    from detectron2.utils.visualizer import VisImage  # here: see mgd_det/visualization/figures.py

    if not columns or not images:
        raise ValueError("draw_predictions needs at least one column and one image")
    for title, entries in columns.items():
        if len(entries) != len(images):
            raise ValueError(f"column {title!r} has {len(entries)} entries for {len(images)} images")
    shapes = [[max(1, round(side * tile_size / max(i.shape[:2]))) for side in i.shape[:2]] for i in images]
    tops = np.cumsum([_HEADER] + [h + _GAP for h, _ in shapes]).tolist()
    lefts = [_GAP + column * (max(w for _, w in shapes) + _GAP) for column in range(len(columns) + 1)]
    sheet = np.full((tops[-1], lefts[-1], 3), 255, dtype=np.uint8)
    for left, entries in zip(lefts, columns.values()):
        for image, entry, (h, w), top in zip(images, entries, shapes, tops):
            tile = _draw(image, entry, (h, w), class_names, score_threshold, show_masks)
            sheet[top : top + h, left : left + w] = tile
    picture = VisImage(sheet)
    for left, right, title in zip(lefts, lefts[1:], columns):
        picture.ax.text((left + right - _GAP) / 2, _HEADER / 2, title, ha="center", va="center", fontsize=12)
    return save_figure(picture.fig, output, dpi=picture.dpi)


def draw_objects(
    image: np.ndarray,
    objects: Objects,
    class_names: Sequence[str],
    score_threshold: float = 0.3,
    show_masks: bool = True,
    least_size: int = 0,
) -> np.ndarray:
    """Draw one image with its objects.

    Args:
        image: (H, W, 3) uint8 RGB.
        objects: as the entries of the columns of :func:`draw_predictions`.
        class_names: see :func:`draw_predictions`.
        score_threshold: see :func:`draw_predictions`.
        show_masks: see :func:`draw_predictions`.
        least_size: a smaller image is enlarged so that its longer side has this many pixels, for the letters to fit.

    Returns:
        (h, w, 3) uint8 RGB: the image's own size unless it was enlarged.
    """
    scale = max(least_size / max(image.shape[:2]), 1)
    h, w = (round(side * scale) for side in image.shape[:2])
    return _draw(image, objects, (h, w), class_names, score_threshold, show_masks)


def _draw(
    image: np.ndarray,
    entry: Objects,
    tile: Tuple[int, int],
    class_names: Sequence[str],
    score_threshold: float,
    show_masks: bool,
) -> np.ndarray:
    """Return the image with its objects, (h, w, 3)."""
    from detectron2.utils.visualizer import Visualizer

    size, h, w = image.shape[:2], *tile
    # Scaled first, so that lines and letters have the same size on every image.
    interpolation = cv2.INTER_CUBIC if h > size[0] else cv2.INTER_AREA
    visualizer = Visualizer(cv2.resize(image, (w, h), interpolation=interpolation))
    boxes, labels, scores, masks = _of_instances(entry) if isinstance(entry, Instances) else _of_annotations(entry)
    kept = [i for i, score in enumerate(scores) if score is None or score >= score_threshold]
    if not kept:
        scored = isinstance(entry, Instances) and entry.has("scores")
        note = f"nothing with a score of {score_threshold:g} or more" if scored else "no object"
        visualizer.draw_text(note, (4, 4), color="w", horizontal_alignment="left")
        return visualizer.get_output().get_image()
    for i in kept:
        if show_masks and masks[i] is not None:
            scaled = cv2.resize(_bitmap(masks[i], size), (w, h), interpolation=cv2.INTER_NEAREST)
            # Not by overlay_instances, which fills the holes of a mask.
            visualizer.draw_binary_mask(scaled, class_color(labels[i]), alpha=_MASK_ALPHA, area_threshold=0)
    texts = [class_names[labels[i]] + ("" if scores[i] is None else f" {scores[i]:.2f}") for i in kept]
    visualizer.overlay_instances(
        boxes=np.array([boxes[i] for i in kept]) * np.tile([w / size[1], h / size[0]], 2),
        labels=texts,
        assigned_colors=[class_color(labels[i]) for i in kept],
    )
    for text in visualizer.output.ax.texts:  # the Visualizer lets them stick out at the right and below
        (x, y), extent = text.get_position(), text.get_window_extent()
        text.set_position((x - max(0, extent.x1 + 2 - w), y + min(0, extent.y0 - 2)))
    return visualizer.get_output().get_image()


# Boxes (x0, y0, x1, y1), class indices, scores and masks of R objects.
_Parts = Tuple[Sequence[Any], List[int], Sequence[Optional[float]], Sequence[Any]]


def _of_instances(instances: Instances) -> _Parts:
    prefix = "pred" if instances.has("pred_boxes") else "gt"
    labels = instances.get(f"{prefix}_classes").tolist()
    absent: List[Any] = [None] * len(labels)
    masks = instances.get(f"{prefix}_masks") if instances.has(f"{prefix}_masks") else absent
    masks = getattr(masks, "polygons", getattr(masks, "tensor", masks))
    scores = instances.scores.tolist() if instances.has("scores") else absent
    return instances.get(f"{prefix}_boxes").tensor.tolist(), labels, scores, masks


def _of_annotations(annotations: Annotations) -> _Parts:
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    masks = [a.get("segmentation") or None for a in annotations]
    return boxes, [a["category_id"] for a in annotations], [None] * len(annotations), masks


def _bitmap(mask: Any, size: Tuple[int, int]) -> np.ndarray:
    """Return (H, W) uint8 of a mask: a tensor or array (H, W), polygons, or an RLE."""
    from detectron2.utils.visualizer import GenericMask

    if hasattr(mask, "detach"):
        mask = mask.detach().cpu().numpy()
    return GenericMask(mask, *size).mask
