"""Distillation of boxes, masks and CrossKD: which predictions meet, in each kind of detector."""

import copy

import numpy as np
import pytest
import torch
import toy
from detectron2.layers import cat
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torchvision.ops import generalized_box_iou
from toy import FCOS, RCNN, RETINANET

from mgd_det.modeling import attach_losses, find_distillation

CASCADE = toy.DETECTORS["cascade_mask_rcnn"][1]
BOXES = ["MODEL.MGD.BOXES.WEIGHT", "2.0"]
MASKS = ["MODEL.MGD.MASKS.WEIGHT", "2.0"]
CROSS = ["MODEL.MGD.CROSS_KD.WEIGHT", "2.0", "MODEL.MGD.CROSS_KD.BOX_WEIGHT", "1.5"]
LEVELS = ("p3", "p4", "p5", "p6", "p7")
# Nothing that differs between training and evaluation, and each part with numbers of its own.
FIXED = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""]
FIXED += ["MODEL.RETINANET.NORM", "", "MODEL.FCOS.NORM", ""]


def teach(tmp_path, base, distilled, opts=(), student_opts=()):
    """The student's detector with distillation, and the teacher alone: random, but as if it had learned something."""
    torch.manual_seed(7)
    teacher = build_model(toy.teacher_config(base, opts=opts)).eval()
    toy.randomize_norms(teacher)
    for name, parameter in teacher.named_parameters():
        if any(part in name for part in ("cls_score.w", "bbox_pred.w", "mask_head.predictor.w")):
            torch.nn.init.normal_(parameter, 0, 0.1)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    at = ["MODEL.MGD.LOSS.NAMES", "['at']", *distilled]
    cfg = toy.distilled_config(str(tmp_path / "teacher.pth"), base, opts=[*at, *opts, *student_opts])
    cfg.MODEL.MGD.TEACHER.OPTS = [*cfg.MODEL.MGD.TEACHER.OPTS, *opts]
    return build_model(cfg), teacher


def losses_of(detector):
    attach_losses(detector)
    with EventStorage():
        return detector.train()(toy.batch())


def recorded(module, calls):
    """Keeps (arguments, result) of each call of a module."""
    module.register_forward_hook(lambda _, args, output: calls.append((args, output)))


@torch.no_grad()
def teacher_features(teacher, names):
    features = teacher.backbone(teacher.preprocess_image(toy.batch()).tensor)
    return [features[name] for name in names]


def by_anchor(levels, values):
    """(B * H * W * A, values), image by image, of (B, A * values, H, W) of each level."""
    images = []
    for image in range(len(levels[0])):
        for level in levels:
            height, width = level.shape[-2:]
            images.append(level[image].reshape(-1, values, height, width).permute(2, 3, 0, 1).reshape(-1, values))
    return torch.cat(images)


def anchors_of(detector, levels):
    one = Boxes.cat(detector.anchor_generator(levels)).tensor
    return torch.cat([one] * len(levels[0]))


def box_loss(student, teacher, scores, normalizer=None):
    giou = torch.stack([generalized_box_iou(s[None], t[None])[0, 0] for s, t in zip(student, teacher)])
    has_area = (teacher[:, 2:] > teacher[:, :2]).all(dim=1)
    losses, weights = (x.double().numpy() for x in (1 - giou, scores * has_area))
    losses[weights == 0] = 0  # without area, GIoU is not a number
    return (weights * losses).sum() / (normalizer or max(weights.sum(), 1))


def check_gradient(loss, detector, *parts):
    """The loss teaches the student, and not the teacher."""
    loss.backward()
    for part in ("backbone.bottom_up.res2.0.conv1", *parts):
        assert detector.get_submodule(part).weight.grad.abs().sum() > 0, part
    assert all(p.grad is None for p in find_distillation(detector).teacher.detector.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("base", [RETINANET, FCOS])
def test_boxes_of_every_anchor(tmp_path, base):
    detector, teacher = teach(tmp_path, base, BOXES)
    calls = []
    recorded(detector.head, calls)
    losses = losses_of(detector)
    levels = teacher_features(teacher, LEVELS)
    with torch.no_grad():
        logits, deltas = teacher.head(levels)[:2]
        anchors = anchors_of(teacher, levels)
        scores = by_anchor(logits, 10).sigmoid().max(dim=1).values
        theirs, ours = (
            detector.box2box_transform.apply_deltas(by_anchor(of, 4), anchors) for of in (deltas, calls[0][1][1])
        )
    expected = 2 * box_loss(ours, theirs, scores)
    assert "loss_kd_logits" not in losses and expected > 0.1
    assert losses["loss_kd_boxes"].item() == pytest.approx(expected, rel=1e-3)
    check_gradient(losses["loss_kd_boxes"], detector, "head.bbox_pred")
    assert detector.head.cls_score.weight.grad is None  # the boxes do not teach the classes


@pytest.mark.slow
@pytest.mark.parametrize("opts", [(), CASCADE], ids=["class-specific", "cascade"])
def test_boxes_and_masks_of_the_students_own_proposals(tmp_path, opts):
    detector, teacher = teach(tmp_path, RCNN, [*BOXES, *MASKS], opts)
    heads, pooled, predicted, masks, instances = detector.roi_heads, [], [], [], []
    predictors = list(heads.box_predictor) if opts else [heads.box_predictor]
    for predictor in predictors:
        recorded(predictor, predicted)
    recorded(heads.box_pooler, pooled)
    recorded(heads.mask_head, instances)
    recorded(heads.mask_head.predictor, masks)
    losses = losses_of(detector)
    levels = teacher_features(teacher, ("p2", "p3", "p4", "p5"))
    expected = []
    with torch.no_grad():
        for stage, predictor in enumerate(predictors):
            head, of_teacher = teacher.roi_heads.box_head, teacher.roi_heads.box_predictor
            if opts:
                head, of_teacher = head[stage], of_teacher[stage]
            boxes = pooled[stage][0][1]
            logits, theirs = of_teacher(head(teacher.roi_heads.box_pooler(levels, boxes)))
            probabilities = logits.softmax(dim=1)[:, :10]
            ours, rows = predicted[stage][1][1], []
            for row, best in enumerate(probabilities.argmax(dim=1).tolist()):
                columns = slice(0, 4) if opts else slice(4 * best, 4 * best + 4)
                rows.append((ours[row, columns], theirs[row, columns]))
            proposals = cat([b.tensor for b in boxes])
            decoded = [predictor.box2box_transform.apply_deltas(torch.stack(d), proposals) for d in zip(*rows)]
            expected.append(2 * box_loss(*decoded, probabilities.max(dim=1).values))
        (given, (ours, *_)) = instances[0][0][1], [output for _, output in masks]
        boxes, classes = [x.proposal_boxes for x in given], cat([x.gt_classes for x in given])
        theirs = teacher.roi_heads.mask_head.layers(teacher.roi_heads.mask_pooler(levels, boxes))
    assert min(expected) > 0.01
    assert losses["loss_kd_boxes"].item() == pytest.approx(np.sum(expected), rel=1e-3)
    assert len(classes) > 0 and (classes == 3).all()
    q, p = (1 / (1 + np.exp(-x.detach()[:, 3].double().numpy())) for x in (ours, theirs))
    divergence = 2 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert divergence > 1e-4 and losses["loss_kd_masks"].item() == pytest.approx(divergence, rel=1e-3)
    of_boxes = "roi_heads.box_predictor.0.bbox_pred" if opts else "roi_heads.box_predictor.bbox_pred"
    total = losses["loss_kd_boxes"] + losses["loss_kd_masks"]
    check_gradient(total, detector, of_boxes, "roi_heads.mask_head.predictor")


@pytest.mark.slow
@pytest.mark.parametrize("base, layer", [(RETINANET, 0), (RETINANET, 1), (RETINANET, -1), (FCOS, 1)])
def test_the_students_features_in_the_teachers_head(tmp_path, base, layer):
    """Two convolutions, each with a norm and an activation: -1 is 1."""
    convs = ["MODEL.RETINANET.NUM_CONVS", "2", "MODEL.FCOS.NUM_CONVS", "2"]
    opts = [*convs, "MODEL.RETINANET.NORM", "BN", "MODEL.FCOS.NORM", "BN"]
    layers = ["MODEL.MGD.CROSS_KD.LAYER", str(layer)]
    detector, teacher = teach(tmp_path, base, [*CROSS, *layers], opts)
    entries = {"cls_subnet": [], "bbox_subnet": []}
    for head, kept in ((detector.head, 0), (teacher.head, 1)):
        for name, calls in entries.items():
            calls.append([])
            tower = getattr(head, name)
            # conv, norm, ReLU, conv, norm, ReLU
            before = tower[0] if layer == 0 else tower[1]
            recorded(before, calls[kept])
    losses = losses_of(detector)
    levels = teacher_features(teacher, LEVELS)
    with torch.no_grad():
        logits, deltas = teacher.head(levels)[:2]
        crossed = {}
        for name, predict in (("cls_subnet", teacher.head.cls_score), ("bbox_subnet", teacher.head.bbox_pred)):
            tower, outputs = getattr(teacher.head, name), []
            for ours, theirs in zip(*entries[name]):
                s, t = (call[0][0] if layer == 0 else call[1] for call in (ours, theirs))
                s, t = s.detach().double().numpy(), t.double().numpy()
                axes = {"axis": (0, 2, 3), "keepdims": True}
                x = (s - s.mean(**axes)) / s.std(**axes) * t.std(**axes) + t.mean(**axes)
                x = torch.from_numpy(x).float()
                for module in list(tower)[0 if layer == 0 else 2 :]:
                    x = module(x)
                outputs.append(predict(x))
            crossed[name] = outputs
        p, q = (1 / (1 + np.exp(-by_anchor(x, 10).double().numpy())) for x in (logits, crossed["cls_subnet"]))
        entropy = -(p * np.log(q) + (1 - p) * np.log(1 - q))
        expected_classes = 2 * (np.abs(p - q) * entropy).sum() / detector.loss_normalizer
        anchors = anchors_of(teacher, levels)
        of_teacher, of_student = (
            teacher.box2box_transform.apply_deltas(by_anchor(x, 4), anchors) for x in (deltas, crossed["bbox_subnet"])
        )
        scores = by_anchor(logits, 10).sigmoid().max(dim=1).values
    expected_boxes = 2 * 1.5 * box_loss(of_student, of_teacher, scores, detector.loss_normalizer)
    assert min(expected_classes, expected_boxes) > 1e-3
    # p7 is one place of two images, whose deviation amplifies rounding
    assert losses["loss_kd_cross_cls"].item() == pytest.approx(expected_classes, rel=0.01)
    assert losses["loss_kd_cross_boxes"].item() == pytest.approx(expected_boxes, rel=0.01)
    total = losses["loss_kd_cross_cls"] + losses["loss_kd_cross_boxes"]
    check_gradient(total, detector, *([] if layer == 0 else ["head.cls_subnet.0", "head.bbox_subnet.0"]))
    assert detector.head.cls_score.weight.grad is None  # the student's prediction layers take no part


@pytest.mark.slow
@pytest.mark.parametrize("base, distilled", [(RETINANET, BOXES + CROSS), (FCOS, BOXES + CROSS), (RCNN, BOXES + MASKS)])
def test_a_perfect_student_has_the_smallest_loss(tmp_path, base, distilled):
    same = [*FIXED, *toy.NARROW_R50]
    detector, teacher = teach(tmp_path, base, [*distilled, "MODEL.MGD.LOGITS.WEIGHT", "1.0"], same)
    losses = {}
    for name in ("fresh", "perfect"):
        if name == "perfect":
            detector.load_state_dict(teacher.state_dict())
        torch.manual_seed(0)
        losses[name] = {k: v.item() for k, v in losses_of(detector).items() if k.startswith("loss_kd_")}
    assert len(losses["perfect"]) == (4 if base != RCNN else 3)
    for name, value in losses["perfect"].items():
        # Rounding, in features and in the corners of thin boxes, leaves a little.
        assert abs(value) < 0.02 * losses["fresh"][name], name


@pytest.mark.slow
def test_the_teachers_head_runs_once_and_only_in_steps_that_distil(tmp_path):
    everything = [*BOXES, *CROSS, "MODEL.MGD.LOGITS.WEIGHT", "1.0", "MODEL.MGD.BOXES.DECAY", "linear"]
    detector, _ = teach(tmp_path, RETINANET, [*everything, "MODEL.MGD.INTERVAL", "2", "MODEL.MGD.STOP_ITER", "8"])
    distillation, calls, values = find_distillation(detector), [], []
    recorded(distillation.teacher.detector.head, calls)
    for iteration in (0, 1, 4, 8):
        distillation.schedule.set_iteration(iteration, 10)
        losses = losses_of(detector)
        values.append(losses.get("loss_kd_boxes"))
        assert ("loss_kd_cross_cls" in losses) == ("loss_kd_logits" in losses) == (iteration in (0, 4))
    assert len(calls) == 2 and values[1] is values[3] is None
    assert values[2].item() == pytest.approx(values[0].item() / 2, rel=1e-4)  # half of STOP_ITER is over
    # DistributedDataParallel needs a gradient of every parameter.
    distillation.schedule.set_iteration(0, 10)
    sum(losses_of(detector).values()).backward()
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("base, distilled", [(RETINANET, BOXES + CROSS), (RCNN, BOXES + MASKS)])
def test_copies_and_mixed_precision(tmp_path, base, distilled):
    """A copy records its own forwards; under autocast the losses are those of float32, nearly."""
    detector, _ = teach(tmp_path, base, distilled)
    attach_losses(detector)
    twin = copy.deepcopy(detector)
    results, of_teacher = [], []
    heads = find_distillation(detector).teacher.detector
    recorded(heads.head.bbox_pred if base == RETINANET else heads.roi_heads.box_predictor.bbox_pred, of_teacher)
    for model, precision in ((detector, torch.float32), (twin, torch.bfloat16)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            results.append(losses_of(model))
    # Its boxes are decoded from what the last layer predicts.
    assert len(of_teacher) > 1 and all(deltas.dtype == torch.float32 for _, deltas in of_teacher)
    sum(results[1].values()).backward()
    assert twin.backbone.bottom_up.res2[0].conv1.weight.grad.isfinite().all()
    assert detector.backbone.bottom_up.res2[0].conv1.weight.grad is None
    for name in (name for name in results[0] if name.startswith("loss_kd_")):
        assert results[1][name].dtype == torch.float32
        assert results[1][name].item() == pytest.approx(results[0][name].item(), rel=0.2), name


@pytest.mark.slow
@pytest.mark.parametrize("base, distilled", [(RETINANET, BOXES + CROSS), (RCNN, BOXES + MASKS)])
def test_images_without_objects(tmp_path, base, distilled):
    """There is no foreground proposal then, and CrossKD's normaliser is the running mean alone."""
    detector, _ = teach(tmp_path, base, distilled)
    attach_losses(detector)
    inputs = [{**x, "instances": x["instances"][:0]} for x in toy.batch()]
    with EventStorage():
        losses = detector.train()(inputs)
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_kd_boxes"] > 0
    if base == RCNN:
        assert losses["loss_kd_masks"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.requires_grad)
