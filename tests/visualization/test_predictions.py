"""Pictures of predictions: every box, mask and label where it belongs."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from fast_cases import fast
from matplotlib.image import imread

from mgd_det.visualization.predictions import class_color, draw_objects, draw_predictions

NAMES = ["bag", "boot", "coat"]
GREY = 200
GAP, HEADER = 6, 30
TILE = 256  # images below have 64 pixels, so that everything is enlarged 4 times


def grey_images(number=1, shape=(64, 64)):
    return [np.full((*shape, 3), GREY, np.uint8) for _ in range(number)]


def predicted(boxes, scores, classes, masks=None, shape=(64, 64)):
    instances = Instances(shape)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.tensor(classes, dtype=torch.long)
    if masks is not None:
        instances.pred_masks = masks
    return instances


def annotation(box, label, **others):
    return {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, **others}


def draw(tmp_path, columns, images=None, **options):
    output = tmp_path / "predictions.png"
    options = {"tile_size": TILE, **options}
    assert draw_predictions(columns, images or grey_images(), NAMES, output, **options) == str(output)
    return (imread(output)[..., :3] * 255).round().astype(int)


def tile(picture, row=0, column=0):
    top, left = HEADER + row * (TILE + GAP), GAP + column * (TILE + GAP)
    return picture[top : top + TILE, left : left + TILE]


def near(pixels, label, tolerance=15):
    """Where the pixels have the class's color, half transparent over the image."""
    return np.abs(pixels - (0.5 * GREY + 0.5 * 255 * np.array(class_color(label)))).max(axis=-1) <= tolerance


def grey(pixels):
    return np.abs(pixels - GREY).max(axis=-1) <= 2


def test_boxes_are_drawn_where_they_are(tmp_path):
    picture = draw(tmp_path, {"model": [predicted([[16, 24, 48, 56]], [0.9], [2])]})
    assert picture.shape == (HEADER + TILE + GAP, 2 * GAP + TILE, 3)
    part = tile(picture)
    # Scaled by 4: x 64..192, y 96..224. The label may cover a part of the upper edge only.
    for y, x in [(150, 64), (200, 64), (150, 192), (200, 192), (224, 100), (224, 180)]:
        assert near(part[y - 1 : y + 1, x - 1 : x + 1], 2).any(), f"no outline at y {y}, x {x}"
    assert grey(part[125:210, 75:180]).all(), "the inside is not the image"
    assert grey(part[:70]).all() and grey(part[232:]).all() and grey(part[:, :55]).all() and grey(part[:, 220:]).all()


def test_score_threshold(tmp_path):
    boxes, classes = [[4, 30, 24, 60], [40, 30, 60, 60]], [0, 1]
    columns = {"model": [predicted(boxes, [0.29, 0.31], classes)]}
    part = tile(draw(tmp_path, columns))
    assert not near(part, 0).any() and near(part[:, 160:], 1).any()
    part = tile(draw(tmp_path, columns, score_threshold=0.2))
    assert near(part[:, :110], 0).any() and near(part[:, 160:], 1).any()


def test_nothing_detected_is_said(tmp_path):
    part = tile(draw(tmp_path, {"model": [predicted([], [], [])]}))
    assert (part[:30] < 100).any(), "no text"
    assert grey(part[40:]).all()


def test_columns_and_rows(tmp_path):
    truth = [[annotation([8, 20, 40, 36], 0)], [annotation([8, 20, 40, 36], 1)]]
    model = [predicted([[8, 20, 48, 56]], [0.8], [2]), predicted([[8, 20, 48, 56]], [0.8], [0])]
    picture = draw(tmp_path, {"Ground truth": truth, "Student": model}, grey_images(2))
    assert picture.shape == (HEADER + 2 * (TILE + GAP), GAP + 2 * (TILE + GAP), 3)
    for row, column, label in [(0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 0)]:
        part = tile(picture, row, column)
        found = [near(part[150, 30:36], other).any() for other in range(3)]
        assert found == [other == label for other in range(3)]
        assert (picture[:HEADER, GAP + column * (TILE + GAP) :][:, :TILE] < 100).any(), "no title"


def left_half_masks():
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 16:48, 16:32] = True
    return mask


@pytest.mark.parametrize("kind", fast(["tensor", "bitmasks", "polygons", "rle", "annotated polygons"], "tensor", "rle"))
def test_masks_are_shaded(tmp_path, kind):
    import pycocotools.mask as mask_util

    mask, polygon = left_half_masks(), [16.0, 16.0, 32.0, 16.0, 32.0, 48.0, 16.0, 48.0]
    if kind == "tensor":
        entry = predicted([[16, 16, 48, 48]], [0.9], [1], mask)
    elif kind in ("bitmasks", "polygons"):
        entry = Instances((64, 64))
        entry.gt_boxes, entry.gt_classes = Boxes(torch.tensor([[16.0, 16.0, 48.0, 48.0]])), torch.tensor([1])
        entry.gt_masks = BitMasks(mask) if kind == "bitmasks" else PolygonMasks([[np.array(polygon)]])
    else:
        rle = mask_util.encode(np.asfortranarray(mask[0].numpy().astype(np.uint8)))
        entry = [annotation([16, 16, 32, 32], 1, segmentation=rle if kind == "rle" else [polygon])]
    part = tile(draw(tmp_path, {"model": [entry]}))
    blended = 0.6 * GREY + 0.4 * 255 * np.array(class_color(1))
    assert np.abs(part[100:180, 75:120] - blended).max() <= 2, "the left half is not shaded"
    assert grey(part[100:180, 136:180]).all(), "the right half is shaded"
    part = tile(draw(tmp_path, {"model": [entry]}, show_masks=False))
    assert grey(part[100:180, 75:120]).all()


def test_drawings_stay_in_their_tile(tmp_path):
    """Boxes in the corners, whose labels have no room beside them."""
    boxes = [[0, 0, 6, 6], [58, 0, 64, 6], [0, 58, 6, 64], [58, 58, 64, 64], [0, 0, 64, 64]]
    picture = draw(tmp_path, {"model": [predicted(boxes, [0.9] * 5, [0, 1, 2, 0, 1])], "none": [[]]})
    outside = picture.copy()
    tile(outside)[:] = tile(outside, 0, 1)[:] = 255
    outside[:HEADER] = 255
    # Older versions of Matplotlib let one column of a tile's background spill over.
    assert np.isin(outside, (255, GREY)).all() and (outside != 255).any(axis=2).sum() <= len(outside)
    assert (tile(picture, 0, 1)[40:, 1:] == GREY).all()


def dark(pixels):
    """Number of pixels of the labels' ground."""
    return int((pixels.max(axis=-1) < 80).sum())


@pytest.mark.parametrize("box", [[50, 20, 63, 60], [40, 57, 52, 64], [56, 57, 64, 64]])
def test_labels_at_the_border_are_whole(tmp_path, box):
    inside = tile(
        draw(tmp_path, {"model": [predicted([[20, 20, 20 + box[2] - box[0], 20 + box[3] - box[1]]], [0.9], [2])]})
    )
    border = tile(draw(tmp_path, {"model": [predicted([box], [0.9], [2])]}))
    assert dark(border) == pytest.approx(dark(inside), rel=0.1) and dark(inside) > 200


def test_labels_name_class_and_score(tmp_path):
    box = [[20, 20, 44, 60]]
    pictures = [
        tile(draw(tmp_path, {"model": [predicted(box, [score], [label])]}))[:100]
        for score, label in [(0.9, 0), (0.9, 0), (0.8, 0), (0.9, 1)]
    ]
    assert dark(pictures[0]) > 200
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any() and (pictures[0] != pictures[3]).any()


def test_images_of_other_shapes(tmp_path):
    images = grey_images(1, (40, 80)) + grey_images(1, (80, 40))
    box = predicted([[10, 10, 30, 30]], [0.9], [0])
    picture = draw(tmp_path, {"model": [box, box]}, images, tile_size=160)
    assert picture.shape == (HEADER + 80 + GAP + 160 + GAP, 2 * GAP + 160, 3)
    for top in (HEADER, HEADER + 80 + GAP):
        assert near(picture[top + 50, GAP + 19 : GAP + 22], 0).any()
        assert near(picture[top + 50, GAP + 59 : GAP + 62], 0).any()


def test_wrong_number_of_entries():
    with pytest.raises(ValueError, match="'model' has 1 entries for 2 images"):
        draw_predictions({"model": [[]]}, grey_images(2), NAMES, "nowhere.png")
    with pytest.raises(ValueError, match="at least one"):
        draw_predictions({}, grey_images(1), NAMES, "nowhere.png")


def test_class_colors_differ_and_repeat():
    colors = np.array([class_color(label) for label in range(20)])
    assert colors.min() >= 0 and colors.max() <= 1
    assert len(np.unique(colors.round(4), axis=0)) == 20
    assert len(class_color(10**6)) == 3


def test_one_image_at_its_own_size_or_enlarged():
    objects = predicted([[16, 24, 48, 56], [2, 2, 6, 6]], [0.9, 0.2], [2, 1])
    large = draw_objects(grey_images()[0], objects, NAMES, least_size=256)
    assert large.shape == (256, 256, 3) and large.dtype == np.uint8
    assert near(large[149:151, 63:65].astype(int), 2).any()  # the left edge, at four times its place
    assert grey(large[:40, :40].astype(int)).all()  # the score of the other is too low
    assert draw_objects(grey_images(shape=(300, 200))[0], objects, NAMES, least_size=256).shape == (300, 200, 3)
