"""The parts of EmbedMask against loops over pixels in numpy."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from embed_mask_oracle import hinge_errors, iou, lovasz_by_permutations, lovasz_by_thresholds, probability, resized
from embedmask.coupling import add_location, mask_probability
from embedmask.lovasz import lovasz_hinge
from embedmask.mask_inference import MaskInference, select_proposals
from embedmask.mask_loss import MaskLoss
from embedmask.mask_samples import MaskSamples, image_masks, mask_samples, padded_regions, small_masks

from mgd_det.errors import ArgumentError


# ------------------------------------------------------------------ coupling
def test_two_matrix_products_are_the_formula():
    rng = np.random.default_rng(0)
    pixels, proposals, margins = rng.normal(size=(5, 12)), rng.normal(size=(3, 5)), rng.uniform(0, 0.5, (3, 5))
    expected = [[probability(pixels[:, j], proposals[k], margins[k]) for j in range(12)] for k in range(3)]
    found = mask_probability(*(torch.tensor(x, dtype=torch.float32) for x in (pixels, proposals, margins)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_the_probability_is_exact_far_from_the_origin_and_under_autocast():
    # 40 units away, p^2 is 1600, which bfloat16 holds to 4.
    pixels = torch.tensor([[40.0, 40.5], [-30.0, -30.0], [0.0, 1.0]])
    proposals, margins = torch.tensor([[40.0, -30.0, 0.5]]), torch.tensor([[0.2, 0.2, 0.3]])
    expected = torch.tensor([[0.3 * 0.25, 0.2 * 0.25 + 0.3 * 0.25]]).neg().exp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mask_probability(pixels, proposals, margins)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert (mask_probability(pixels[:, :1], pixels[:, :1].t(), torch.ones(1, 3)) <= 1).all()


def test_locations_are_added_to_the_first_two_dimensions():
    rng = np.random.default_rng(1)
    maps, locations = rng.normal(size=(2, 4, 3)).astype(np.float32), np.array([[8.0, 0], [16, 4], [24, 32]])
    expected = maps.copy()
    for image, place in itertools.product(range(2), range(3)):
        for axis in range(2):
            expected[image, axis, place] += locations[place, axis] / 16
    of_pixels = add_location(torch.tensor(maps), torch.tensor(locations), 16.0, dim=1)
    of_places = add_location(torch.tensor(maps.transpose(0, 2, 1)), torch.tensor(locations), 16.0, dim=2)
    np.testing.assert_allclose(of_pixels.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(of_places.numpy(), expected.transpose(0, 2, 1), rtol=1e-6)


# ------------------------------------------------------------------ Lovasz hinge
@pytest.mark.parametrize("seed", range(6))
def test_the_lovasz_hinge_is_the_lovasz_extension(seed):
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.uniform(size=6), rng.uniform(size=6) < 0.5
    if seed == 0:
        labels[:] = False
    if seed == 1:
        probabilities[2:5] = 0.25  # equal errors
    errors = hinge_errors(probabilities, labels)
    found = lovasz_hinge(torch.tensor(probabilities[None]), torch.tensor(labels[None]), torch.ones(1, 6).bool())
    assert found.item() == pytest.approx(lovasz_by_thresholds(errors, list(labels)), abs=1e-12)
    assert found.item() == pytest.approx(lovasz_by_permutations(errors, list(labels)), abs=1e-12)


def test_pixels_outside_the_region_do_not_count():
    rng = np.random.default_rng(7)
    probabilities, labels = rng.uniform(size=(3, 9)), rng.uniform(size=(3, 9)) < 0.5
    region = rng.uniform(size=(3, 9)) < 0.6
    values = torch.tensor(probabilities, requires_grad=True)
    found = lovasz_hinge(values, torch.tensor(labels), torch.tensor(region))
    for row, inside in enumerate(region):
        own = [list(x[row][inside]) for x in (probabilities, labels)]
        assert found[row].item() == pytest.approx(lovasz_by_thresholds(hinge_errors(*own), own[1]), abs=1e-12)
    found.sum().backward()
    assert (values.grad[~torch.tensor(region)] == 0).all() and (values.grad != 0).any()


def test_the_gradient_of_the_lovasz_hinge_is_that_of_finite_differences():
    torch.manual_seed(0)
    values = torch.rand(2, 7, dtype=torch.float64, requires_grad=True)
    labels, region = torch.rand(2, 7) < 0.5, torch.rand(2, 7) < 0.8
    assert torch.autograd.gradcheck(lambda x: lovasz_hinge(x, labels, region), values)


# ------------------------------------------------------------------ samples
def test_objects_with_a_place_and_a_cell_have_samples():
    masks = torch.zeros(3, 30, 40, dtype=torch.bool)
    masks[0, 8:24, 8:16] = True
    masks[1, 0:30, 20:21] = True  # too thin for the map: no cell of 4 x 4 is half full
    masks[2, 16:28, 28:40] = True
    boxes = torch.tensor([[8.0, 8, 16, 24], [20, 0, 21, 30], [28, 16, 40, 28]])
    # Place 3 is of the thin object; 1, 5 and 7 are of none.
    objects = torch.tensor([0, -1, 0, 1, 2, -1, 2, -1])
    found = mask_samples(objects, boxes, masks, (30, 40), (8, 12), stride=4, padding=0.0)
    assert found.places.tolist() == [0, 2, 4, 6]
    assert found.owners.tolist() == [0, 0, 1, 1]
    expected = np.zeros((2, 8, 12), bool)
    expected[0, 2:6, 2:4] = expected[1, 4:7, 7:10] = True
    assert (found.labels.numpy() == expected).all()
    assert (found.region.numpy() == expected).all()  # these boxes are whole cells


def test_cells_are_of_an_object_that_fills_half_of_them():
    rng = np.random.default_rng(2)
    masks = rng.uniform(size=(2, 10, 14)) < 0.5
    padded = np.zeros((2, 16, 16))
    padded[:, :10, :14] = masks
    expected = [[[padded[k, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum() >= 8 for j in range(4)] for i in range(4)]
                for k in range(2)]  # fmt: skip
    assert small_masks(torch.tensor(masks), (4, 4), 4).tolist() == expected


def test_regions_are_the_enlarged_boxes_within_the_image():
    boxes = [[10.0, 6, 30, 16], [0, 0, 50, 40]]
    found = padded_regions(torch.tensor(boxes), (38, 50), (10, 13), 4, padding=0.1).numpy()
    for k, (left, top, right, bottom) in enumerate(boxes):
        dx, dy = 0.1 * (right - left), 0.1 * (bottom - top)
        for i, j in itertools.product(range(10), range(13)):
            x, y = 4 * j + 2, 4 * i + 2
            inside = left - dx <= x < right + dx and top - dy <= y < bottom + dy and x < 50 and y < 38
            assert found[k, i, j] == inside, (k, i, j)


def test_polygons_and_bitmaps_are_the_same_masks():
    polygon = [np.array([2.0, 2, 10, 2, 10, 9, 2, 9])]
    of_polygons = image_masks(Instances((12, 16), gt_masks=PolygonMasks([polygon])), torch.device("cpu"))
    expected = np.zeros((1, 12, 16), bool)
    expected[0, 2:9, 2:10] = True
    assert (of_polygons.numpy() == expected).all()
    assert image_masks(Instances((12, 16), gt_masks=BitMasks(of_polygons)), torch.device("cpu")).equal(of_polygons)
    assert image_masks(Instances((12, 16), gt_masks=PolygonMasks([])), torch.device("cpu")).shape == (0, 12, 16)


# ------------------------------------------------------------------ losses
def batch_of_samples(rng, dim=3, places=6, size=(2, 3)):
    samples = []
    for owners in ([0, 0, 1], [0, 1, 1, 1]):
        labels = rng.uniform(size=(2, *size)) < 0.5
        region = rng.uniform(size=(2, *size)) < 0.9
        chosen = torch.tensor(rng.permutation(places)[: len(owners)])
        samples.append(MaskSamples(chosen, torch.tensor(owners), torch.tensor(labels), torch.tensor(region)))
    pixels, embeddings = rng.normal(size=(2, dim, *size)), rng.normal(size=(2, places, dim))
    return pixels, embeddings, rng.uniform(0.1, 1, size=(2, places, dim)), samples


def test_the_losses_are_those_of_the_definition():
    pixels, embeddings, margins, samples = batch_of_samples(np.random.default_rng(3))
    masks, distances = [], []
    for image, sample in enumerate(samples):
        for k in range(2):
            own = [p for p, owner in zip(sample.places.tolist(), sample.owners.tolist()) if owner == k]
            q, m = (np.mean([x[image, p] for p in own], axis=0) for x in (embeddings, margins))
            distances.append(
                np.mean([((embeddings[image, p] - q) ** 2).sum() + ((margins[image, p] - m) ** 2).sum() for p in own])
            )
            cells = [(i, j) for i in range(2) for j in range(3) if sample.region[k, i, j]]
            labels = [bool(sample.labels[k, i, j]) for i, j in cells]
            predicted = [probability(pixels[image, :, i, j], q, m) for i, j in cells]
            masks.append(lovasz_by_thresholds(hinge_errors(predicted, labels), labels))
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (pixels, embeddings, margins)]
    found = MaskLoss(mask_weight=0.7, smooth_weight=0.3)(*tensors, samples)
    assert found["loss_mask"].item() == pytest.approx(0.7 * np.mean(masks), rel=1e-4)
    assert found["loss_mask_smooth"].item() == pytest.approx(0.3 * np.mean(distances), rel=1e-4)


@pytest.mark.parametrize("empty", [False, True])
def test_gradients_are_finite_and_there_for_all(empty):
    *values, samples = batch_of_samples(np.random.default_rng(4))
    tensors = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in values]
    if empty:
        nothing, masks = torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, 3, dtype=torch.bool)
        samples = [MaskSamples(nothing, nothing, masks, masks)] * 2
    losses = MaskLoss()(*tensors, samples)
    sum(losses.values()).backward()
    for tensor in tensors:
        assert tensor.grad.isfinite().all() and (tensor.grad != 0).any() == (not empty)
    assert all((loss.item() == 0) == empty for loss in losses.values())


@pytest.mark.parametrize("argument", ["box_padding", "mask_weight", "smooth_weight"])
def test_a_negative_option_is_refused(argument):
    with pytest.raises(ArgumentError, match=f"{argument}.*-1"):
        MaskLoss(**{argument: -1})


# ------------------------------------------------------------------ inference
@pytest.mark.parametrize("size", [(14, 18), (21, 25), (7, 9)])
@pytest.mark.parametrize("pixels_at_once", [1, 1 << 26])
def test_masks_have_the_images_own_size_and_stay_in_the_box(size, pixels_at_once, monkeypatch):
    monkeypatch.setattr("embedmask.mask_inference._PIXELS_AT_ONCE", pixels_at_once)
    rng = np.random.default_rng(5)
    probabilities = rng.uniform(size=(3, 4, 5))  # of an image of 14 x 18, padded to 16 x 20
    boxes = rng.uniform(0, 0.4, (3, 4)) * np.array([size[1], size[0]] * 2)
    boxes[:, 2:] += np.array([size[1], size[0]]) * 0.5
    found = MaskInference(threshold=0.53)(torch.tensor(probabilities), 4, (14, 18), torch.tensor(boxes), size).numpy()
    assert found.shape == (3, *size) and found.any() and found.dtype == bool
    for k in range(3):
        values = resized(probabilities[k], (16, 20))[:14, :18]
        values = values if size == (14, 18) else resized(values, size)
        for i, j in itertools.product(*map(range, size)):
            left, top, right, bottom = boxes[k]
            inside = left <= j + 0.5 <= right and top <= i + 0.5 <= bottom
            if abs(values[i, j] - 0.53) > 1e-9:
                assert found[k, i, j] == (inside and values[i, j] > 0.53), (k, i, j)


def test_no_detection_has_no_mask():
    masks = MaskInference()(torch.zeros(0, 4, 5), 4, (14, 18), torch.zeros(0, 4), (28, 36))
    assert masks.shape == (0, 28, 36) and masks.dtype == torch.bool


@pytest.mark.parametrize("threshold", [0, 1, -0.5, True, "0.5"])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ArgumentError, match=f"threshold.*{threshold!r}"):
        MaskInference(threshold=threshold)


@pytest.mark.parametrize("candidates, detections", [(100, 100), (4, 5)])
def test_detections_are_the_best_of_each_level_without_duplicates(candidates, detections):
    rng = np.random.default_rng(6)
    scores = [rng.uniform(size=(n, 2)) for n in (12, 5)]
    corners = [rng.uniform(0, 10, (n, 2)) for n in (12, 5)]
    boxes = [np.concatenate([c, c + rng.uniform(8, 12, c.shape)], axis=1) for c in corners]
    found = select_proposals(
        [torch.tensor(x, dtype=torch.float32) for x in scores],
        [torch.tensor(x, dtype=torch.float32) for x in boxes],
        (30, 30),
        0.3,
        candidates,
        0.6,
        detections,
    )
    pool, first = [], 0
    for level_scores, level_boxes in zip(scores, boxes):
        rows = [(level_scores[r, c], c, r + first, level_boxes[r]) for r in range(len(level_boxes)) for c in range(2)]
        pool += sorted((row for row in rows if row[0] > 0.3), key=lambda row: -row[0])[:candidates]
        first += len(level_boxes)
    kept = []
    for row in sorted(pool, key=lambda row: -row[0]):
        if all(other[1] != row[1] or iou(other[3], row[3]) <= 0.6 for other in kept):
            kept.append(row)
    kept = kept[:detections]
    assert len(kept) < len(pool) and len({row[2] for row in kept}) > 2
    assert found.places.tolist() == [row[2] for row in kept]
    assert found.pred_classes.tolist() == [row[1] for row in kept]
    np.testing.assert_allclose(found.scores.numpy(), [row[0] for row in kept], rtol=1e-6)
    np.testing.assert_allclose(found.pred_boxes.tensor.numpy(), [row[3] for row in kept], rtol=1e-6)
