"""EmbedMask as a detector: against FCOS and loops in numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
import toy
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances
from embed_mask_oracle import iou, probability, resized
from embedmask import EmbedMaskHead, PixelHead
from torch.nn.parallel import DistributedDataParallel
from toy_embed_mask import small_model, step

from mgd_det.errors import ArgumentError, UserError


# ------------------------------------------------------------------ heads
def test_a_pixel_has_the_prior_probability_at_the_prior_distance():
    levels = [ShapeSpec(channels=8, stride=stride) for stride in (8, 32)]
    head = EmbedMaskHead(input_shape=levels, conv_dims=[8], num_classes=2, dim=3, prior_distance=2.0)
    *_, margins = head([torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 1, 1)])
    assert [m.shape for m in margins] == [(1, 3, 4, 4), (1, 3, 1, 1)]
    # At level 2 the first two dimensions, where the location is, have four times the distance.
    for level, distances in zip(margins, ((2, 2, 2), (8, 8, 2))):
        for dim, distance in enumerate(distances):
            assert math.exp(-level[0, dim, 0, 0].item() * distance**2) == pytest.approx(0.5, rel=1e-5)


def test_margins_do_not_change_the_box_tower():
    head = EmbedMaskHead(input_shape=[ShapeSpec(channels=8, stride=8)], conv_dims=[8], num_classes=2, dim=3)
    *_, embeddings, margins = head([torch.randn(1, 8, 4, 4)])
    margins[0].sum().backward(retain_graph=True)
    assert head.bbox_subnet[0].weight.grad is None and head.margin.weight.grad.abs().sum() > 0
    embeddings[0].sum().backward()
    assert head.bbox_subnet[0].weight.grad.abs().sum() > 0


def test_the_other_outputs_are_fcos():
    torch.manual_seed(0)
    features = [torch.randn(2, 8, 4, 4)]
    head = EmbedMaskHead(input_shape=[ShapeSpec(channels=8, stride=8)], conv_dims=[8], num_classes=2, dim=3)
    ours, theirs = head(features), super(EmbedMaskHead, head).forward(features)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ours, theirs)) and len(theirs) == 3


LEVEL = ShapeSpec(channels=8, stride=8)


@pytest.mark.parametrize("make, argument", [
    (lambda: EmbedMaskHead(input_shape=[LEVEL], conv_dims=[8], num_classes=2, dim=2), "dim.*2"),
    (lambda: PixelHead(input_shape=LEVEL, num_convs=-1), "num_convs.*-1"),
    (lambda: PixelHead(input_shape=ShapeSpec(channels=8, stride=3)), "input_shape.*3"),
])  # fmt: skip
def test_wrong_arguments_of_heads_are_named(make, argument):
    with pytest.raises(ArgumentError, match=argument):
        make()


# ------------------------------------------------------------------ training
def test_places_are_assigned_by_centre_size_and_mask():
    model = small_model()
    features = [torch.zeros(1, 16, size, size) for size in (16, 8, 4, 2, 1)]
    anchors = model.anchor_generator(features)
    boxes = [[4.0, 4, 60, 52], [20, 20, 44, 40], [0, 0, 128, 120]]
    masks = torch.zeros(3, 128, 128, dtype=torch.bool)
    masks[0, 4:52, 4:60] = masks[1, 20:40, 20:44] = masks[2, :120] = True
    masks[1, 20:30] = False  # what hides this half of the second object is the first one
    instances = Instances((128, 128), gt_boxes=Boxes(torch.tensor(boxes)), gt_masks=BitMasks(masks))
    instances.gt_classes = torch.tensor([4, 7, 2])
    expected = []
    for level, size in enumerate((16, 8, 4, 2, 1)):
        stride = 8 * 2**level
        low, high = (0 if level == 0 else 4 * stride), (math.inf if level == 4 else 8 * stride)
        for i, j in itertools.product(range(size), range(size)):
            x, y, fits = (j + 0.5) * stride, (i + 0.5) * stride, []
            for k, (left, top, right, bottom) in enumerate(boxes):
                sides = (x - left, y - top, right - x, bottom - y)
                off = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2))
                is_on_mask = x < 128 and y < 128 and masks[k, int(y), int(x)]
                if min(sides) > 0 and off < 1.5 * stride and low < max(sides) < high and is_on_mask:
                    fits.append(((right - left) * (bottom - top), k))
            expected.append(min(fits)[1] if fits else -1)
    assert set(expected) == {-1, 0, 1, 2}
    assert model._objects_of_places(anchors, instances).tolist() == expected
    assert model._objects_of_places(anchors, instances[[]]).tolist() == [-1] * len(expected)
    (classes, nothing), (learned, _) = model.label_anchors(anchors, [instances, instances[[]]])
    assert classes.tolist() == [10 if k < 0 else [4, 7, 2][k] for k in expected] and set(nothing.tolist()) == {10}
    assert [learned[i].tolist() for i, k in enumerate(expected) if k >= 0] == [boxes[k] for k in expected if k >= 0]


def test_a_step_has_fcos_losses_and_two_more_and_reaches_every_parameter():
    model = small_model()
    losses = step(model, toy.batch())
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "loss_mask", "loss_mask_smooth"}
    assert losses["loss_mask"] > 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (model.pixel_head.embedding, model.head.margin))


def test_half_precision_has_about_the_same_losses():
    exact = step(small_model(), toy.batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = step(small_model(), toy.batch())
    for name, loss in half.items():
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact[name].item(), rel=0.1), name


@pytest.mark.parametrize("kept", [[0], []])
def test_images_without_objects(kept):
    inputs = toy.batch()
    for index in {0, 1} - set(kept):
        # As Detectron2's mapper makes them: without gt_masks.
        inputs[index]["instances"] = annotations_to_instances([], (64, 64), mask_format="bitmask")
    model = small_model()
    losses = step(model, inputs)
    assert (losses["loss_mask"] > 0) == bool(kept)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_a_rank_without_objects_trains_with_the_others(run_ranks):
    def rank_step(rank):
        inputs = toy.batch(seed=rank)
        if rank == 1:
            for image in inputs:
                image["instances"] = image["instances"][[]]
        model = DistributedDataParallel(small_model())
        losses = step(model, inputs)
        sum(losses.values()).backward()
        return losses["loss_mask"].item(), [p.grad for p in model.parameters()]

    (first, gradients), (second, others) = run_ranks(rank_step, 2)
    assert first > 0 and second == 0
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(gradients, others))


def test_an_object_that_is_hidden_in_the_middle_is_not_learned():
    inputs = toy.batch()
    for image in inputs:  # what is left of it lies beside all places that may learn it
        image["instances"].gt_masks.tensor[:, :, 12:36] = False
    losses = step(small_model(), inputs)
    assert losses["loss_mask"] == losses["loss_fcos_loc"] == losses["loss_fcos_ctr"] == 0


def test_masks_that_were_not_loaded_are_one_message():
    inputs = toy.batch()
    inputs[0]["instances"].remove("gt_masks")
    with pytest.raises(UserError, match="MODEL.MASK_ON.*use_instance_mask"):
        step(small_model(), inputs)


@pytest.mark.slow
def test_it_learns_a_mask_that_is_not_its_box():
    model = small_model("MODEL.EMBED_MASK.MASK_WEIGHT", "1.0")
    inputs = toy.batch()
    y, x = np.mgrid[:64, :64]
    disc = torch.tensor((x - 24) ** 2 + (y - 27) ** 2 < 15**2)
    for image in inputs:
        image["instances"].gt_masks = BitMasks(disc[None])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = step(model, inputs)
        optimizer.zero_grad()
        sum(loss.values()).backward()
        optimizer.step()
        losses.append(loss["loss_mask"].item())
    assert losses[-1] < 0.5 * losses[0]
    # With the statistics of the batch: those of so short a training are of its start.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    with torch.no_grad():
        found = model.eval()(inputs)[0]["instances"]
    common = (found.pred_masks[0] & disc).sum() / (found.pred_masks[0] | disc).sum()
    assert common > 0.7


# ------------------------------------------------------------------ evaluation
def trained_looking(model):
    """Random weights that find objects of several classes."""
    torch.manual_seed(1)
    for layer, std in ((model.head.cls_score, 0.3), (model.head.bbox_pred, 0.1), (model.head.embedding, 0.3)):
        torch.nn.init.normal_(layer.weight, std=std)
    torch.nn.init.constant_(model.head.cls_score.bias, -1.0)
    torch.nn.init.constant_(model.head.bbox_pred.bias, 1.5)
    torch.nn.init.normal_(model.pixel_head.embedding.weight, std=0.5)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("output_size", [(64, 96), (50, 80)])
def test_detections_are_those_of_the_definition(output_size):
    model = trained_looking(small_model("MODEL.FCOS.SCORE_THRESH_TEST", "0.4", "TEST.DETECTIONS_PER_IMAGE", "12"))
    kept = {}
    model.head.register_forward_hook(lambda module, args, output: kept.update(head=output))
    model.pixel_head.register_forward_hook(lambda module, args, output: kept.update(pixels=output))
    inputs = toy.batch(sizes=((64, 96),))
    inputs[0]["height"], inputs[0]["width"] = output_size
    with torch.no_grad():
        found = model(inputs)[0]["instances"]

    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    pool, tensors = [], [[level[0].double().numpy() for level in levels] for levels in kept["head"]]
    for level, (logits, deltas, centerness, embeddings, margins) in enumerate(zip(*tensors)):
        stride = 8 * 2**level
        for i, j in itertools.product(*map(range, logits.shape[1:])):
            x, y = (j + 0.5) * stride, (i + 0.5) * stride
            left, top, right, bottom = np.maximum(deltas[:, i, j], 0) * stride
            box = np.array([x - left, y - top, x + right, y + bottom])
            q = embeddings[:, i, j] + [x / 16, y / 16, 0, 0]
            for c in range(10):
                score = np.sqrt(sigmoid(logits[c, i, j]) * sigmoid(centerness[0, i, j]))
                if score > 0.4:
                    pool.append((score, c, box, q, margins[:, i, j]))
    chosen = []
    for row in sorted(pool, key=lambda row: -row[0]):
        if all(other[1] != row[1] or iou(other[2], row[2]) <= 0.6 for other in chosen):
            chosen.append(row)
    chosen = chosen[:12]
    assert len(chosen) == 12 < len(pool)
    assert found.pred_classes.tolist() == [row[1] for row in chosen]
    np.testing.assert_allclose(found.scores.numpy(), [row[0] for row in chosen], rtol=1e-4)

    pixels = kept["pixels"][0].double().numpy()
    height, width = output_size
    assert found.pred_masks.shape == (12, height, width) and found.image_size == output_size
    is_sure = 0
    for k, (_, _, box, q, margin) in enumerate(chosen):
        box = np.clip(box * np.array([width / 96, height / 64] * 2), 0, [width, height] * 2)
        np.testing.assert_allclose(found.pred_boxes.tensor[k].numpy(), box, rtol=1e-3, atol=1e-3)
        values = np.array([
            [probability(pixels[:, i, j] + [(j + 0.5) / 4, (i + 0.5) / 4, 0, 0], q, margin) for j in range(24)]
            for i in range(16)
        ])  # fmt: skip
        values = resized(values, (64, 96))
        values = values if output_size == (64, 96) else resized(values, output_size)
        for i, j in itertools.product(range(0, height, 3), range(0, width, 3)):
            inside = box[0] <= j + 0.5 <= box[2] and box[1] <= i + 0.5 <= box[3]
            if abs(values[i, j] - 0.53) > 1e-3:
                assert found.pred_masks[k, i, j] == (inside and values[i, j] > 0.53), (k, i, j)
                is_sure += inside
    assert is_sure > 100 and 0 < found.pred_masks.sum()


def test_an_image_without_detections_has_no_masks():
    model = small_model("MODEL.FCOS.SCORE_THRESH_TEST", "0.99").eval()
    with torch.no_grad():
        small, large = model(toy.batch(sizes=((64, 64), (40, 90))))
    assert small["instances"].pred_masks.shape == (0, 64, 64) and large["instances"].pred_masks.shape == (0, 40, 90)
    assert not large["instances"].has("mask_probabilities")
