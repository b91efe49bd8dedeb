"""Draw one scene of cut-out photos over a background.

Shape shorthand in this module: H, W of the scene; h, w of a patch, the upright box around a rotated photo. Images are
BGR, as OpenCV writes them.
"""

from dataclasses import dataclass
from typing import List, Tuple

import cv2
import numpy as np

from mgd_det.data.fashion_scenes.photos import CLASS_NAMES, PHOTO_SIDE

# Grey value above which a pixel is clothing: black cloth is as low as 10, the backdrop's noise is not.
_BACKDROP = 8
# Sandals and bags have real openings (straps, handles); a hole in any other photo is dark cloth.
_CLASSES_WITH_OPENINGS = (CLASS_NAMES.index("Sandal"), CLASS_NAMES.index("Bag"))
_LARGEST_FILLED_HOLE = 6  # pixels of the photo, in those two classes
_SQUARE = np.ones((3, 3), np.uint8)


@dataclass(frozen=True)
class Placement:
    """One object to draw.

    Attributes:
        photo: (28, 28) uint8.
        label: index into CLASS_NAMES.
        center: x, y of the photo's centre in the scene, in pixels.
        scale: scene pixels per photo pixel.
        angle: rotation in degrees, counter-clockwise.
        flip: mirror it left to right first.
        tint: blue, green, red in [0, 1] that white cloth becomes.
    """

    photo: np.ndarray
    label: int
    center: Tuple[float, float]
    scale: float
    angle: float = 0.0
    flip: bool = False
    tint: Tuple[float, float, float] = (1.0, 1.0, 1.0)


def silhouette(photo: np.ndarray, label: int) -> np.ndarray:
    """Return the (28, 28) uint8 mask (0 or 1) of the clothing in a photo (28, 28) uint8."""
    # The border joins the parts of the backdrop, even if the clothing reaches two edges.
    mask = np.pad((photo > _BACKDROP).astype(np.uint8), 1)
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    if count > 2:
        # Specks are noise; a large second part (such as one below a black stripe) is clothing too.
        keep = areas >= 0.15 * areas[1:].max()
        keep[0] = False
        mask = keep[parts].astype(np.uint8)

    _, parts, stats, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    largest = _LARGEST_FILLED_HOLE if label in _CLASSES_WITH_OPENINGS else photo.size
    hole = stats[:, cv2.CC_STAT_AREA] <= largest
    hole[0] = hole[parts[0, 0]] = False  # part 0 is the clothing, the other the backdrop around it
    return (mask | hole[parts])[1:-1, 1:-1].astype(np.uint8)


def compose_scene(
    background: np.ndarray, placements: List[Placement], min_visible: float
) -> Tuple[np.ndarray, List[Tuple[int, np.ndarray]]]:
    """Draw objects over a background, the farthest first.

    Args:
        background: (H, W, 3) uint8; not changed.
        placements: each hides what it covers of those before it.
        min_visible: share of an object's silhouette that must be visible, that is, inside the image and not covered,
            for the object to be returned.

    Returns:
        The scene (H, W, 3) uint8, and for each object visible enough its label and the mask (H, W) uint8 of its
        visible part. The masks of a scene do not overlap.
    """
    image = background.astype(np.float32)
    height, width = image.shape[:2]
    # 1 + index of the nearest object at each pixel, 0 for the background.
    nearest = np.zeros((height, width), np.int16)
    whole_areas = []
    for index, placement in enumerate(placements):
        color, alpha = _patch(placement)
        inside = alpha > 0.5
        whole_areas.append(int(inside.sum()))
        left = int(round(placement.center[0] - alpha.shape[1] / 2))
        top = int(round(placement.center[1] - alpha.shape[0] / 2))
        x0, x1 = max(left, 0), min(left + alpha.shape[1], width)
        y0, y1 = max(top, 0), min(top + alpha.shape[0], height)
        if x0 >= x1 or y0 >= y1:
            continue
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        opacity = alpha[part][:, :, None]
        scene_part = image[y0:y1, x0:x1]
        scene_part += opacity * (color[part] - scene_part)
        nearest[y0:y1, x0:x1][inside[part]] = index + 1

    objects = []
    visible_areas = np.bincount(nearest.ravel(), minlength=len(placements) + 1)[1:]
    for index, placement in enumerate(placements):
        if visible_areas[index] and visible_areas[index] >= min_visible * whole_areas[index]:
            objects.append((placement.label, (nearest == index + 1).astype(np.uint8)))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), objects


def _patch(placement: Placement) -> Tuple[np.ndarray, np.ndarray]:
    # Returns color (h, w, 3) float32 in 0..255 and opacity (h, w) float32 in 0..1 of the rotated photo.
    photo, mask = placement.photo, silhouette(placement.photo, placement.label)
    if placement.flip:
        photo, mask = photo[:, ::-1], mask[:, ::-1]
    # A photo's outermost pixels are mixed with its black backdrop. They, and those beyond them that interpolation
    # reaches, take the grey of the cloth inside, so that there is no dark rim.
    inner = cv2.erode(mask, _SQUARE)
    grey = np.where(inner > 0, photo, cv2.dilate(photo * mask, _SQUARE)).astype(np.float32)
    edge = cv2.GaussianBlur(mask.astype(np.float32), (3, 3), 0.6, borderType=cv2.BORDER_CONSTANT)

    middle = (PHOTO_SIDE - 1) / 2
    matrix = np.asarray(cv2.getRotationMatrix2D((middle, middle), placement.angle, placement.scale), float)
    extent = np.abs(matrix[0, :2]).sum() * (PHOTO_SIDE + 1)  # a square's box has equal sides
    side = int(np.ceil(extent)) + 2
    matrix[:, 2] += (side - PHOTO_SIDE) / 2
    cloth = cv2.warpAffine(grey, matrix, (side, side), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    ramp = cv2.warpAffine(edge, matrix, (side, side), flags=cv2.INTER_LINEAR)
    # Sharpen the ramp, which enlarging has stretched, to about one pixel of the scene.
    alpha = np.clip((ramp - 0.5) * max(1.0, placement.scale) + 0.5, 0, 1)
    # Black cloth keeps some of the tint: shades are 20 % to 100 % of it.
    shade = 51 + 0.8 * np.clip(cloth, 0, 255)
    return shade[:, :, None] * np.asarray(placement.tint, np.float32), alpha


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a muted texture with thin clutter, (size, size, 3) uint8; ``size`` is in pixels."""

    def noise(cells: int, channels: int, amplitude: float) -> np.ndarray:
        grid = rng.normal(0, amplitude, (cells, cells, channels)).astype(np.float32)
        return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC).reshape(size, size, channels)

    base = rng.uniform(75, 180) + rng.normal(0, 7, 3)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    steepness = rng.uniform(0, 50)
    gradient = steepness * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    texture = noise(int(rng.integers(3, 7)), 1, 14) + noise(3, 3, 4) + noise(24, 1, 4)
    image = np.clip(texture + gradient[:, :, None] + base, 0, 255).astype(np.uint8)

    pen = max(1, size // 128)
    for _ in range(int(rng.integers(3, 10))):
        color = tuple(float(v) for v in np.clip(base + rng.normal(0, 26) + rng.normal(0, 8, 3), 20, 225))
        x, y = (int(v) for v in rng.integers(0, size, 2))
        length, turn = rng.uniform(0.06, 0.3) * size, rng.uniform(0, 360)
        thickness = pen * int(rng.integers(1, 3))
        kind = rng.integers(0, 3)
        if kind == 0:
            end = (int(x + length * np.cos(np.radians(turn))), int(y + length * np.sin(np.radians(turn))))
            cv2.line(image, (x, y), end, color, thickness, cv2.LINE_AA)
        else:
            axes = (int(length / 2), max(1, int(length * rng.uniform(0.1, 0.5))))
            arc = rng.uniform(60, 300) if kind == 1 else 360.0
            cv2.ellipse(image, (x, y), axes, turn, 0, arc, color, thickness, cv2.LINE_AA)
    return image
