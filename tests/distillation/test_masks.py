"""Masks of boxes and scores, and every loss with a mask: against numpy, one pixel, image or channel at a time."""

import numpy as np
import oracles
import pytest
import torch
import toy_distiller

from mgd_det.distillation import (
    Padding,
    activation_boundary,
    attention_transfer,
    box_mask,
    channel_wise_kl,
    partial_l2,
    pearson_distance,
    plain_l2,
    score_mask,
)
from mgd_det.errors import ArgumentError

PADDING = Padding([(64, 96), (40, 70)], (64, 96))
BOXES = [
    [[8.0, 10.0, 40.0, 44.0], [20.5, 12.0, 30.0, 23.0], [90.0, 50.0, 96.0, 64.0]],
    [[0.0, 0.0, 70.0, 7.9], [33.0, 33.0, 33.5, 34.0]],
]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}


# ------------------------------------------------------------------ the masks
def fpn_sizes(padded):
    """The sizes of a RetinaNet's levels, by its own convolutions."""
    sizes = {}
    x = torch.zeros(1, 1, *padded)
    for name in STRIDES:
        steps = 3 if name == "p3" else 1
        for _ in range(steps):
            x = torch.nn.functional.conv2d(x, torch.zeros(1, 1, 3, 3), stride=2, padding=1)
        sizes[name] = tuple(x.shape[2:])
    return sizes


def boxes_by_numpy(boxes, image_size, size, stride, foreground, background):
    """Asks of each pixel of the map which boxes overlap it."""
    rows, columns = ([i for i in range(n) if i * stride < length] for n, length in zip(size, image_size))
    overlapped = {}
    for k, (left, top, right, bottom) in enumerate(boxes):
        overlapped[k] = {
            (y, x)
            for y in rows
            for x in columns
            if left < (x + 1) * stride and right > x * stride and top < (y + 1) * stride and bottom > y * stride
        }
    outside = {(y, x) for y in rows for x in columns} - set().union(*overlapped.values())
    mask = np.zeros(size)
    for pixels in overlapped.values():
        for pixel in pixels:
            mask[pixel] = max(mask[pixel], foreground / len(pixels))
    for pixel in outside:
        mask[pixel] = background / len(outside)
    return mask * size[0] * size[1]


@pytest.mark.parametrize("size, stride", [((16, 24), 4), ((8, 12), 8), ((4, 6), 16), ((2, 3), 32), ((1, 2), 64)])
def test_boxes_weigh_by_their_area(size, stride):
    mask = box_mask([torch.tensor(b) for b in BOXES], PADDING, size, foreground=1.5, background=0.25)
    assert mask.shape == (2, 1, *size) and mask.dtype == torch.float32
    for got, boxes, image_size in zip(mask, BOXES, PADDING.image_sizes):
        expected = boxes_by_numpy(boxes, image_size, size, stride, 1.5, 0.25)
        np.testing.assert_allclose(got[0].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("padded", [(800, 1344), (736, 1312), (480, 640)])
def test_strides_of_an_fpn_are_those_of_its_convolutions(padded):
    for name, size in fpn_sizes(padded).items():
        assert Padding([], padded).strides(size) == (STRIDES[name], STRIDES[name])
    # p7 has 128 pixels a cell, although 7 cells are more than the 800 pixels of a padded batch.
    assert Padding([(640, 1000)], (800, 1344)).cells((7, 11)) == [(5, 8)]


def test_a_stride_that_is_no_power_of_two_is_the_ratio():
    assert Padding([], (224, 448)).strides((16, 32)) == (14, 14)


def test_a_mask_without_boxes_is_one_and_boxes_count_alike():
    nothing = torch.zeros(0, 4)
    assert torch.equal(box_mask([nothing], Padding([(32, 64)], (32, 64)), (4, 8), background=1), torch.ones(1, 1, 4, 8))
    # Two boxes that are apart, small and large: each has the same sum. So has what is outside.
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [16.0, 8.0, 64.0, 32.0]])
    mask = box_mask([boxes], Padding([(32, 64)], (32, 64)), (4, 8), 3.0, 0.5)[0, 0] / 32
    sums = mask[:1, :1].sum(), mask[1:, 2:].sum(), mask.sum()
    assert [x.item() for x in sums] == pytest.approx([3, 3, 6.5], rel=1e-5)
    # A box that covers the whole image leaves no background, which must not divide by 0.
    whole = box_mask([torch.tensor([[0.0, 0.0, 64.0, 32.0]])], Padding([(32, 64)], (32, 64)), (4, 8))
    assert torch.equal(whole, torch.ones(1, 1, 4, 8))


def test_a_degenerate_box_has_a_pixel_and_stays_in_its_image():
    boxes = torch.tensor([[70.0, 40.0, 70.0, 40.0], [-5.0, -5.0, 0.0, 0.0]])
    mask = box_mask([boxes], Padding([(40, 70)], (64, 96)), (8, 12), background=0)[0, 0]
    assert mask.nonzero().tolist() == [[0, 0], [4, 8]]


def test_scores_weigh_by_their_share_of_the_batch():
    scores = torch.sigmoid(random(2, 1, 8, 12)).float()
    mask = score_mask(scores, PADDING)
    kept = scores.double().numpy().copy()
    kept[1, :, 5:] = 0
    kept[1, :, :, 9:] = 0
    np.testing.assert_allclose(mask.numpy(), kept / kept.sum() * kept.size, rtol=1e-5)
    assert (score_mask(torch.zeros(2, 1, 8, 12), PADDING) == 0).all()


# ------------------------------------------------------------------ the losses, in numpy
def l2_by_numpy(student, target, mask):
    return np.mean([np.mean((s - t) ** 2 * m) for s, t, m in zip(student, target, mask)])


def boundary_by_numpy(student, target, mask, margin=1.0):
    total = 0.0
    for s, t, m in zip(student.ravel(), target.ravel(), np.broadcast_to(mask, student.shape).ravel()):
        total += m * (max(margin - s, 0) ** 2 if t > 0 else max(margin + s, 0) ** 2)
    return total / student.size


def kl_by_numpy(student, target, mask, temperature=1.0):
    total = []
    for images in zip(student, target, mask):
        for s, t in zip(images[0], images[1]):
            kept = images[2][0] > 0
            p, q = (images[2][0][kept] * np.exp(x[kept] / temperature) for x in (t, s))
            p, q = p / p.sum(), q / q.sum()
            total.append(temperature**2 * np.sum(p * np.log(p / q)))
    return np.mean(total)


def pearson_by_numpy(student, target, mask):
    distances = []
    for c in range(student.shape[1]):
        (ss, st), (_, tt) = np.cov(student[:, c].ravel(), target[:, c].ravel(), aweights=mask.ravel(), ddof=0)
        distances.append(1 - st / np.sqrt(ss * tt))
    return np.mean(distances)


def attention_by_numpy(student, teacher, mask, power=2.0):
    distances = []
    for s, t, m in zip(student, teacher, mask):
        maps = [(np.abs(x) ** power).sum(axis=0) for x in (s, t)]
        maps = [x / np.sqrt((m[0] * x**2).sum()) for x in maps]
        distances.append((m[0] * (maps[0] - maps[1]) ** 2).sum())
    return np.mean(distances)


MARGIN = -torch.linspace(0.1, 1.0, 4, dtype=torch.float64)


def mean_partial_l2(student, target, mask=None):
    return partial_l2(student, target, MARGIN, "mean", mask)


def partial_by_numpy(student, target, mask):
    return np.mean(oracles.partial_l2(student, target, MARGIN.numpy())[0] * mask)


LOSSES = [
    (mean_partial_l2, partial_by_numpy, {}),
    (plain_l2, l2_by_numpy, {}),
    (activation_boundary, boundary_by_numpy, {}),
    (activation_boundary, boundary_by_numpy, {"margin": 0.3}),
    (channel_wise_kl, kl_by_numpy, {}),
    (channel_wise_kl, kl_by_numpy, {"temperature": 3.0}),
    (pearson_distance, pearson_by_numpy, {}),
    (attention_transfer, attention_by_numpy, {}),
    (attention_transfer, attention_by_numpy, {"power": 3.0}),
]


def problem():
    """A mask of very different weights, some 0."""
    mask = random(3, 1, 5, 6, seed=3).exp().square()
    mask[:, :, :, 4] = 0
    mask[1, :, 3:] = 0
    return random(3, 4, 5, 6, seed=1), random(3, 4, 5, 6, seed=2), mask


@pytest.mark.parametrize("loss, by_numpy, options", LOSSES)
def test_a_mask_weighs_the_pixels_of_a_loss(loss, by_numpy, options):
    student, target, mask = problem()
    student.requires_grad_()
    value = loss(student, target, mask=mask, **options)
    expected = by_numpy(student.detach().numpy(), target.numpy(), mask.numpy(), **options)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    assert value.item() != pytest.approx(loss(student, target, **options).item(), rel=1e-2)
    in_float32 = loss(student.detach().float(), target.float(), mask=mask.float(), **options)
    assert in_float32.dtype == torch.float32 and in_float32.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert (student.grad[(mask == 0).expand_as(student)] == 0).all()
    for index in [(0, 0, 0, 0), (2, 3, 4, 5), (1, 2, 1, 3)]:
        sides = []
        for step in (1e-6, -1e-6):
            moved = student.detach().numpy().copy()
            moved[index] += step
            sides.append(by_numpy(moved, target.numpy(), mask.numpy(), **options))
        assert student.grad[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("loss, by_numpy, options", LOSSES)
def test_values_without_weight_do_not_count_however_large(loss, by_numpy, options):
    student, target, mask = problem()
    value = loss(student, target, mask=mask, **options)
    for x in (student, target):
        x[(mask == 0).expand_as(x)] = 1e12
    assert loss(student, target, mask=mask, **options).item() == pytest.approx(value.item(), rel=1e-9)


@pytest.mark.parametrize("loss, by_numpy, options", LOSSES)
def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_is_no_loss(loss, by_numpy, options):
    student, target, mask = (x.float() for x in problem())
    ones = loss(student, target, mask=torch.ones_like(mask), **options)
    assert ones.item() == pytest.approx(loss(student, target, **options).item(), rel=1e-5)
    student.requires_grad_()
    nothing = loss(student, target, mask=torch.zeros_like(mask), **options)
    nothing.backward()
    assert nothing.item() == 0 and (student.grad == 0).all()
    # One image without weight beside others.
    student.grad = None
    mask[0] = 0
    value = loss(student, target, mask=mask, **options)
    value.backward()
    assert value > 0 and student.grad.isfinite().all() and (student.grad[0] == 0).all() and (student.grad[2] != 0).any()
    empty = loss(student[:0], target[:0], mask=mask[:0], **options)
    assert empty.item() == 0


# ------------------------------------------------------------------ the losses of positions
@pytest.mark.parametrize("name", ["partial_l2", "l2", "cwd", "pkd", "at", "ab", "fsp"])
def test_every_loss_of_a_distiller_takes_a_mask(name):
    distiller = toy_distiller.matched(losses={name: {}}, norm_groups=1)
    student, teacher = toy_distiller.features()
    masks = {p.name: torch.rand(2, 1, *toy_distiller.SIZES[p.name]) for p in toy_distiller.POSITIONS}
    for mask in masks.values():
        mask[:, :, 1:3] = 0
    plain, masked = distiller(student, teacher), distiller(student, teacher, masks=masks)
    ones = distiller(student, teacher, masks={name: torch.ones_like(mask) for name, mask in masks.items()})
    assert plain.keys() == masked.keys() == ones.keys() and plain
    for key, value in plain.items():
        assert ones[key].item() == pytest.approx(value.item(), rel=1e-5)
        assert masked[key].item() != pytest.approx(value.item(), rel=1e-3)
    distiller.check_mask("boxes")


@pytest.mark.parametrize("scale", ["mean", "target", "authors"])
@pytest.mark.parametrize("reducer", ["amp", "sm"])
def test_partial_l2_by_pixel(reducer, scale):
    """A mask that keeps one pixel, against that pixel as the only one of a map, without a mask."""
    distiller = toy_distiller.matched(reducer=reducer, scale=scale, norm="")
    student, teacher = toy_distiller.features(images=1)
    pixel = [{name: x[:, :, 1:2, 2:3] for name, x in of.items()} for of in (student, teacher)]
    expected = distiller(*pixel)
    for name, (height, width) in toy_distiller.SIZES.items():
        mask = torch.zeros(1, 1, height, width)
        mask[:, :, 1, 2] = height * width
        value = distiller(student, teacher, masks={name: mask})[f"loss_mgd_{name}"].item()
        pixels = height * width if scale == "authors" else 1  # the authors' is a sum over pixels
        assert value == pytest.approx(expected[f"loss_mgd_{name}"].item() * pixels, rel=1e-5)


def test_partial_l2_of_random_drop_is_the_sum_of_its_parts():
    distiller = toy_distiller.matched(reducer="rd")
    student, teacher = toy_distiller.features()
    mask = torch.rand(2, 1, *toy_distiller.SIZES["res2"])
    values = []
    for masks in (None, {"res2": mask}, {"res2": 1 - mask}):
        torch.manual_seed(5)  # the same members of the groups
        values.append(distiller(student, teacher, masks=masks)["loss_mgd_res2"].item())
    assert values[0] == pytest.approx(values[1] + values[2], rel=1e-5) and min(values) > 0


def test_a_loss_that_takes_no_mask_is_named():
    distiller = toy_distiller.matched(losses={"partial_l2": {}, "at": {}})
    distiller._losses[1].loss.takes_mask = False
    with pytest.raises(ArgumentError, match="pixel_mask.name is 'boxes'.*'at'"):
        distiller.check_mask("boxes")
    with pytest.raises(ArgumentError, match="pixel_mask.name is 'boxes'.*no position has a loss"):
        toy_distiller.matched(losses={"l2": {"weights": 0}}).check_mask("boxes")
