"""Post-processing in numpy against Detectron2's own, on raw outputs like those of trained detectors."""

import cv2
import numpy as np
import pytest
import torch
import toy
from detectron2.data import detection_utils
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling import RetinaNet, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from detectron2.structures.keypoints import heatmaps_to_keypoints
from PIL import Image
from torchvision.ops import batched_nms

from mgd_det.export import detector_settings, postprocessing

SIZE = (100, 140)  # of the resized image, which is padded to (128, 160)
CLASSES = 10


@pytest.fixture(scope="module", params=["retinanet", "fcos"])
def detector(request):
    base, opts = toy.DETECTORS[request.param]
    cfg = toy.plain_config(base, opts=opts)
    return build_model(cfg).eval(), cfg


def raw_outputs(detector, spread, offset, decimals=None, seed=0):
    """Parts of the head's outputs by level: normal values, those of logits about ``offset``."""
    generator = torch.Generator().manual_seed(seed)
    anchors = detector.anchor_generator.num_anchors[0]
    channels = [anchors * CLASSES, anchors * 4] + [1] * (anchors == 1)
    parts = []
    for part, number in enumerate(channels):
        levels = []
        for stride in detector.anchor_generator.strides:
            shape = (1, number, -(-128 // stride), -(-160 // stride))
            values = torch.randn(shape, generator=generator) * (spread if part == 0 else 0.5)
            values = values + (offset if part == 0 else 1.0 if anchors == 1 else 0.0)
            levels.append(values if decimals is None or part != 0 else values.round(decimals=decimals))
        parts.append(levels)
    return parts


def both(detector, cfg, parts, image_size=(250, 320)):
    """What Detectron2 and the numpy code find in the same raw outputs."""
    settings = detector_settings(cfg, detector, [str(i) for i in range(CLASSES)])
    images = ImageList(torch.zeros(1, 3, 128, 160), [SIZE])
    copies = [[level.clone() for level in part] for part in parts]  # Detectron2 changes them in place
    (expected,) = detector.forward_inference(images, copies[0], copies)
    expected = detector_postprocess(expected, *image_size)
    outputs = [level.numpy() for part in parts for level in part]
    return expected, postprocessing.detections(outputs, settings, SIZE, image_size)


def assert_same(expected, found):
    assert len(expected) == len(found.boxes)
    np.testing.assert_allclose(found.scores, expected.scores.numpy(), atol=1e-6)
    np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor.numpy(), atol=1e-3)
    assert (found.classes == expected.pred_classes.numpy()).all()
    assert found.boxes.dtype == np.float32 and found.classes.dtype == np.int64


@pytest.mark.parametrize("seed", range(3))
def test_the_same_objects_as_detectron2(detector, seed):
    expected, found = both(*detector, raw_outputs(detector[0], 1.5, -6.0, seed=seed))
    assert 5 < len(expected)
    assert_same(expected, found)


def test_more_candidates_than_a_level_keeps_and_more_objects_than_an_image_has(detector, monkeypatch):
    monkeypatch.setattr(detector[0], "test_topk_candidates", 50)
    unlimited, _ = both(*detector, raw_outputs(detector[0], 2.0, 0.0))
    monkeypatch.setattr(detector[0], "max_detections_per_image", 30)
    expected, found = both(*detector, raw_outputs(detector[0], 2.0, 0.0))
    assert 20 < len(expected) <= 30 < len(unlimited)
    assert_same(expected, found)


def test_no_object(detector):
    expected, found = both(*detector, raw_outputs(detector[0], 0.1, -20.0))
    assert len(expected) == 0
    assert_same(expected, found)
    assert found.boxes.shape == (0, 4)


def test_ties_have_the_same_scores(detector):
    """The order of equal scores is not defined in torch, so that only the scores are compared."""
    expected, found = both(*detector, raw_outputs(detector[0], 0.6, -4.0, decimals=0))
    assert len(np.unique(found.scores.round(6))) < len(found.scores) / 2 or detector[0].__class__.__name__ == "FCOS"
    np.testing.assert_allclose(np.sort(found.scores)[:5], np.sort(expected.scores.numpy())[:5], atol=1e-6)


def test_logits_that_overflow(detector):
    parts = raw_outputs(detector[0], 1.5, -6.0)
    parts[0][0][0, 0, 3, 4], parts[0][0][0, 1, 3, 4], parts[1][1] = 500.0, -500.0, parts[1][1] * 100
    with np.errstate(all="raise", under="ignore"):
        expected, found = both(*detector, parts)
    assert_same(expected, found)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_nms_by_class(threshold):
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 60, (400, 2))
    boxes = np.float32(np.concatenate([corners, corners + rng.uniform(1, 50, (400, 2))], axis=1))
    scores, classes = np.float32(rng.permutation(400) / 400), rng.integers(0, 4, 400)
    expected = batched_nms(*map(torch.from_numpy, (boxes, scores, classes)), threshold).numpy()
    chosen = postprocessing.class_wise_nms(boxes, scores, classes, threshold, most=1000)
    assert chosen.tolist() == expected.tolist()
    assert postprocessing.class_wise_nms(boxes, scores, classes, threshold, most=7).tolist() == expected[:7].tolist()


def test_nms_of_equal_scores_takes_the_first_and_of_empty_boxes_both():
    boxes = np.float32([[0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 5, 5], [5, 5, 5, 5]])
    chosen = postprocessing.class_wise_nms(boxes, np.float32([0.5] * 4), np.zeros(4, int), 0.5, 10)
    assert chosen.tolist() == [0, 2, 3]


def test_masks_in_the_image():
    rng = np.random.default_rng(0)
    masks = np.float32(rng.uniform(0, 1, (5, 28, 28)))
    boxes = np.float32([[3.2, 4.1, 40.7, 33.3], [-8, -3, 20, 55], [50, 30, 90, 90], [10, 10, 11, 60], [0, 0, 64, 48]])
    expected = paste_masks_in_image(torch.from_numpy(masks), torch.from_numpy(boxes), (48, 64)).numpy()
    found = postprocessing.paste_masks(masks, boxes, (48, 64))
    assert expected.any() and (found != expected).mean() < 1e-3


def test_keypoints_of_heatmaps():
    generator = torch.Generator().manual_seed(0)
    heatmaps = torch.randn(4, 3, 56, 56, generator=generator) * 3
    boxes = torch.tensor([[3.2, 4.1, 40.7, 93.3], [-8, -3, 200.4, 55], [50, 30, 50.3, 31.5], [10, 10, 66, 66]])
    expected = heatmaps_to_keypoints(heatmaps, boxes)[:, :, [0, 1, 3]].numpy()
    found = postprocessing.find_keypoints(heatmaps.numpy(), boxes.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert postprocessing.find_keypoints(np.zeros((0, 3, 56, 56)), np.zeros((0, 4))).shape == (0, 3, 3)


@pytest.mark.parametrize("size", [(120, 200), (200, 120), (97, 97), (30, 400)])
@pytest.mark.parametrize("rule", [(64, 100), (800, 1333), (0, 1333)])
@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_the_same_input_as_detectron2s(size, rule, order):
    cfg = toy.plain_config(opts=["INPUT.FORMAT", order, "INPUT.MIN_SIZE_TEST", rule[0], "INPUT.MAX_SIZE_TEST", rule[1]])
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ordered = image if order == "RGB" else np.ascontiguousarray(image[:, :, ::-1])
    resize = ResizeShortestEdge([rule[0]] * 2, rule[1]).get_transform(ordered)
    pixels = torch.as_tensor(resize.apply_image(ordered).transpose(2, 0, 1).copy())
    detector = _OnlyPreprocessing(cfg)
    expected = detector.preprocess_image([{"image": pixels}]).tensor.numpy()
    settings = {**detector.settings, "min_size": rule[0], "max_size": rule[1], "channel_order": order}
    found, resized = postprocessing.network_input(image, settings)
    assert resized == tuple(pixels.shape[1:])
    np.testing.assert_array_equal(found, expected)


class _OnlyPreprocessing:
    """A RetinaNet's preprocessing, without its network."""

    def __init__(self, cfg):
        self.pixel_mean, self.pixel_std = (
            torch.tensor(v).view(-1, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        )
        self.backbone = type("Backbone", (), {"size_divisibility": 32, "padding_constraints": {}})
        self._move_to_current_device = lambda tensor: tensor
        self.preprocess_image = lambda inputs: RetinaNet.preprocess_image(self, inputs)
        self.settings = {"kind": "retinanet", "size_divisibility": 32}
        self.settings.update(pixel_mean=cfg.MODEL.PIXEL_MEAN, pixel_std=cfg.MODEL.PIXEL_STD)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_image_turned_by_exif(tmp_path, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    expected = detection_utils.read_image(str(tmp_path / "a.png"), format="RGB")
    np.testing.assert_array_equal(postprocessing.read_image(tmp_path / "a.png"), expected)


def test_a_grey_image_is_read_as_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.arange(12, dtype=np.uint8).reshape(3, 4))
    image = postprocessing.read_image(tmp_path / "a.png")
    assert image.shape == (3, 4, 3) and (image == image[:, :, :1]).all()


def test_settings_of_another_version_are_refused():
    with pytest.raises(ValueError, match="version 99"):
        postprocessing.read_settings('{"version": 99}')
