"""Predictions of several models on the same images, side by side.

Shape shorthand in this module: H, W of an image; R instances of one image.
"""

import colorsys
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import GenericMask
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from mgd_det.visualization.figures import PathLike, new_figure, save_figure

Annotations = List[Dict[str, Any]]
Objects = Union[Instances, Annotations]
Rgb = Tuple[float, float, float]

_DPI = 100
_GAP, _HEADER = 6, 30  # pixels between tiles; of the line with the columns' names
_MASK_ALPHA = 0.4


@dataclass(frozen=True)
class _Drawn:
    """One object in pixels of its image: box (x0, y0, x1, y1), class, score, mask (H, W) bool."""

    box: np.ndarray
    label: int
    score: Optional[float]
    mask: Optional[np.ndarray]


def class_colors(num_classes: int) -> List[Rgb]:
    """A colour in [0, 1] for each class, as different as so many can be."""
    if num_classes <= 10:
        return [(r, g, b) for r, g, b, _ in map(colormaps["tab10"], range(num_classes))]
    # Steps of the golden ratio keep neighbouring classes apart on the colour circle.
    hues = [(0.618034 * i) % 1 for i in range(num_classes)]
    return [colorsys.hsv_to_rgb(hue, 0.9, (0.95, 0.7)[i % 2]) for i, hue in enumerate(hues)]


def draw_predictions(
    columns: Mapping[str, Sequence[Objects]],
    images: Sequence[np.ndarray],
    class_names: Sequence[str],
    output: PathLike,
    score_threshold: float = 0.3,
    tile_size: int = 384,
    show_masks: bool = True,
) -> str:
    """Draws one row for each image and one column for each model.

    Args:
        columns: title of each column, from left to right (by custom the ground truth first) -> what to
            draw on each image: Instances, predicted or of the ground truth, or annotations as Detectron2's
            data set dicts have them. Their boxes and masks are those of the image at its size here.
        images: (H, W, 3) uint8 RGB each; they may differ in size.
        class_names: by class index.
        output: PNG to write.
        score_threshold: predictions of a lower score are not drawn, in [0, 1].
        tile_size: every image is scaled so that its longer side has this many pixels.
        show_masks: shade masks, where there are some.

    Returns:
        The path of the picture. It is ``len(columns)`` tiles wide, with 6 pixels around each.

    Raises:
        ValueError: a column has not one entry for each image.
    """
    if not columns or not images:
        raise ValueError("draw_predictions needs at least one column and one image")
    for title, entries in columns.items():
        if len(entries) != len(images):
            raise ValueError(f"column {title!r} has {len(entries)} entries for {len(images)} images")
    sizes = [_tile_shape(image.shape, tile_size) for image in images]
    row_tops = np.cumsum([_HEADER] + [h + _GAP for h, _ in sizes])
    column_width = max(w for _, w in sizes) + _GAP
    width, height = _GAP + len(columns) * column_width, int(row_tops[-1])

    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    # Half a pixel more, as matplotlib rounds down.
    figure = new_figure((width + 0.5) / _DPI, (height + 0.5) / _DPI, constrained=False)
    axes = figure.add_axes((0, 0, width / (width + 0.5), height / (height + 0.5)))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    colors = class_colors(len(class_names))
    for c, (title, entries) in enumerate(columns.items()):
        left = _GAP + c * column_width
        axes.text(left + (column_width - _GAP) / 2, _HEADER / 2, title, ha="center", va="center", fontsize=12)
        for image, entry, (h, w), top in zip(images, entries, sizes, row_tops):
            objects = _objects(entry, image.shape[:2], score_threshold, show_masks)
            canvas[top : top + h, left : left + w] = _tile(image, objects, (h, w), colors)
            scale = np.array([w / image.shape[1], h / image.shape[0]] * 2)
            corner = np.array([left, top] * 2)
            _draw_boxes(axes, [(o, o.box * scale + corner) for o in objects], colors)
            _draw_labels(
                axes,
                [(o, o.box * scale + corner) for o in objects],
                class_names,
                colors,
                Bbox([[left, top], [left + w, top + h]]),
            )
            if not objects:
                nothing = f"nothing with a score of {score_threshold:g} or more" if _is_scored(entry) else "no object"
                axes.text(left + 6, top + 6, nothing, va="top", fontsize=9, bbox=_label_box((1, 1, 1)))
    axes.imshow(canvas, extent=(0, width, height, 0), interpolation="nearest", zorder=0)
    return save_figure(figure, output, dpi=_DPI)


def _tile_shape(shape: Tuple[int, ...], longer_side: int) -> Tuple[int, int]:
    scale = longer_side / max(shape[:2])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _tile(image: np.ndarray, objects: List[_Drawn], shape: Tuple[int, int], colors: List[Rgb]) -> np.ndarray:
    """The image at its size in the picture, (h, w, 3), with the masks shaded in."""
    enlarged = shape[0] > image.shape[0]
    size = (shape[1], shape[0])
    tile = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if enlarged else cv2.INTER_AREA).astype(np.float32)
    for drawn in objects:
        if drawn.mask is not None:
            mask = cv2.resize(drawn.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
            tile[mask] = (1 - _MASK_ALPHA) * tile[mask] + _MASK_ALPHA * 255 * np.array(colors[drawn.label])
    return tile.round().clip(0, 255).astype(np.uint8)


def _draw_boxes(axes: Axes, placed: List[Tuple[_Drawn, np.ndarray]], colors: List[Rgb]) -> None:
    for drawn, (x0, y0, x1, y1) in placed:
        for color, line_width, order in (((0.0, 0.0, 0.0), 4, 2), (colors[drawn.label], 2, 3)):
            # The dark line below sets the outline off from a background of its colour.
            axes.add_patch(
                Rectangle(
                    (x0, y0),
                    x1 - x0,
                    y1 - y0,
                    fill=False,
                    edgecolor=color,
                    alpha=0.35 if order == 2 else 1,
                    linewidth=line_width * 72 / _DPI,
                    zorder=order,
                )
            )


def _draw_labels(
    axes: Axes,
    placed: List[Tuple[_Drawn, np.ndarray]],
    class_names: Sequence[str],
    colors: List[Rgb],
    tile: Bbox,
) -> None:
    """Writes class and score at a corner of each box, where there is room; the surest object chooses first."""
    taken: List[Bbox] = []
    for drawn, box in sorted(placed, key=lambda p: -(1.0 if p[0].score is None else p[0].score)):
        background = colors[drawn.label]
        bright = np.dot(background, (0.299, 0.587, 0.114)) > 0.6
        score = "" if drawn.score is None else f" {drawn.score:.2f}"
        text = axes.text(
            0,
            0,
            class_names[drawn.label] + score,
            va="top",
            fontsize=9,
            color="black" if bright else "white",
            bbox=_label_box(background),
            zorder=4,
        )
        area = _free_place(_text_size(axes, text), box, tile, taken)
        text.set_position((area.x0 + 2, area.y0 + 2))
        taken.append(area)


def _free_place(size: Tuple[float, float], box: np.ndarray, tile: Bbox, taken: List[Bbox]) -> Bbox:
    """Where a label of (width, height) goes: above, below or inside its box; the first place that is free."""
    (width, height), (x0, y0, x1, y1) = size, box
    lefts = (x0 - 1, x1 - width + 1)
    tops = (y0 - height, y1, y0 + 1, y1 - height - 1)
    candidates = []
    for top in tops:
        for left in lefts:
            left = min(max(left, tile.x0), max(tile.x1 - width, tile.x0))
            area = Bbox([[left, top], [left + width, top + height]])
            if top >= tile.y0 and top + height <= tile.y1:
                candidates.append(area)
    if not candidates:
        top = min(max(y0, tile.y0), max(tile.y1 - height, tile.y0))
        left = min(max(x0, tile.x0), max(tile.x1 - width, tile.x0))
        candidates.append(Bbox([[left, top], [left + width, top + height]]))
    return next((area for area in candidates if not any(area.overlaps(other) for other in taken)), candidates[0])


def _text_size(axes: Axes, text: Text) -> Tuple[float, float]:
    extent = text.get_window_extent()
    return extent.width + 4, extent.height + 4


def _label_box(background: Rgb) -> Dict[str, Any]:
    return {"facecolor": background, "edgecolor": "none", "boxstyle": "square,pad=0.15", "alpha": 0.85}


def _objects(entry: Objects, shape: Tuple[int, int], threshold: float, masks: bool) -> List[_Drawn]:
    """What to draw of one image, the surest last, so that it lies on top."""
    drawn = _of_instances(entry, shape, masks) if isinstance(entry, Instances) else _of_annotations(entry, shape, masks)
    kept = [d for d in drawn if d.score is None or d.score >= threshold]
    return sorted(kept, key=lambda d: 1.0 if d.score is None else d.score)


def _of_instances(instances: Instances, shape: Tuple[int, int], masks: bool) -> List[_Drawn]:
    predicted = instances.has("pred_boxes")
    prefix = "pred" if predicted else "gt"
    boxes = instances.get(f"{prefix}_boxes").tensor.detach().cpu().numpy()
    labels = instances.get(f"{prefix}_classes").tolist()
    scores = instances.scores.tolist() if instances.has("scores") else [None] * len(labels)
    shapes: List[Optional[np.ndarray]] = [None] * len(labels)
    if masks and instances.has(f"{prefix}_masks"):
        of_all = instances.get(f"{prefix}_masks")
        for i in range(len(labels)):
            shapes[i] = _bitmap(of_all.polygons[i] if hasattr(of_all, "polygons") else of_all[i], shape)
    return [_Drawn(*values) for values in zip(boxes, labels, scores, shapes)]


def _of_annotations(annotations: Annotations, shape: Tuple[int, int], masks: bool) -> List[_Drawn]:
    drawn = []
    for annotation in annotations:
        box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
        mask = _bitmap(annotation["segmentation"], shape) if masks and annotation.get("segmentation") else None
        drawn.append(_Drawn(np.array(box), annotation["category_id"], None, mask))
    return drawn


def _bitmap(mask: Any, shape: Tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a mask in any form that Detectron2 has: a tensor, a BitMasks of one, polygons or RLE."""
    if hasattr(mask, "tensor"):
        mask = mask.tensor[0]
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu().numpy().astype(np.uint8)
    if isinstance(mask, np.ndarray) and mask.ndim == 2:
        return mask > 0
    return GenericMask(mask, *shape).mask > 0


def _is_scored(entry: Objects) -> bool:
    return isinstance(entry, Instances) and entry.has("scores")
