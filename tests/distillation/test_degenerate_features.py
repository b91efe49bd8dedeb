"""Channels and maps with nothing in them to distil: every loss, with every reducer, stays finite."""

import math

import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from toy_distiller import LOSSES

from mgd_det.distillation import POSITION_LOSS_REGISTRY, Distiller, MatchingStatistics, Position, negative_margin
from mgd_det.distillation.reducers import REDUCERS
from mgd_det.modeling import attach_losses, find_distillation

IMAGES, STUDENT, TEACHER = 2, 4, 8
POSITION = Position("res4", "res4", STUDENT, TEACHER)


def noise(channels, size):
    return torch.randn(IMAGES, channels, *size, generator=torch.Generator().manual_seed(channels))


def constant(channels, size, value):
    return torch.full((IMAGES, channels, *size), float(value))


FEATURES = {
    "both all zero": lambda size: (constant(STUDENT, size, 0), constant(TEACHER, size, 0)),
    "student constant": lambda size: (constant(STUDENT, size, 5), noise(TEACHER, size)),
    "teacher constant": lambda size: (noise(STUDENT, size), constant(TEACHER, size, -5)),
    "student all zero": lambda size: (constant(STUDENT, size, 0), noise(TEACHER, size)),
    "teacher all zero": lambda size: (noise(STUDENT, size), constant(TEACHER, size, 0)),
    "both large": lambda size: (noise(STUDENT, size) * 1e4, noise(TEACHER, size) * 1e4),
}


def check_step(distiller, student, teacher):
    """Losses and gradients, of the student's features and of the distiller's norm layers, are finite."""
    student = student.clone().requires_grad_()
    losses = distiller({"res4": student}, {"res4": teacher})
    sum(losses.values()).backward()
    values = {**losses, "the student's gradient": student.grad}
    values.update((name, p.grad) for name, p in distiller.named_parameters())
    assert len(losses) == len(LOSSES)
    for name, value in values.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("size", [(3, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_measured_and_distilled(features, size, reducer):
    """The matching, margins and scale of such features are measured on them, too."""
    student, teacher = FEATURES[features](size)
    for norm in ("GN", "BN", ""):
        distiller = Distiller([POSITION], reducer=reducer, norm=norm, losses={n: {} for n in LOSSES})
        measurement = MatchingStatistics(distiller, {"res4": None}, "measured")
        measurement.update({"res4": student}, {"res4": teacher})
        (report,) = measurement.solve()
        assert torch.isfinite(distiller.margin(POSITION)).all() and distiller.mean_square(POSITION) > 0
        assert math.isfinite(report.cost_after)
        check_step(distiller, student, teacher)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("bias", [0.0, -2.0, 2.0])
def test_margins_of_a_zero_gamma(reducer, bias):
    """A teacher channel whose norm layer is a constant, and one that is nearly so."""
    margin = negative_margin(torch.tensor([0.0, 1e-30, 1.0, -1e30] * 2), torch.full((TEACHER,), bias))
    assert torch.isfinite(margin).all() and (margin <= 0).all() and margin[0] == min(bias, 0)
    groups = torch.arange(TEACHER).view(STUDENT, -1)[:, : 1 if reducer == "sm" else 2]
    distiller = Distiller([POSITION], reducer=reducer, losses={name: {} for name in LOSSES})
    distiller.set_matching(POSITION, groups=groups, margin=margin, mean_square=torch.tensor(0.0))
    student, teacher = noise(STUDENT, (3, 4)), noise(TEACHER, (3, 4))
    teacher[:, :2] = bias
    check_step(distiller, student, teacher)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("matched", [(1, 3), (2,)])
def test_student_channels_without_a_teacher_channel(reducer, matched):
    position = Position("res4", "res4", STUDENT, len(matched))
    groups = torch.full((STUDENT, 1), -1)
    groups[list(matched), 0] = torch.arange(len(matched))
    distiller = Distiller([position], reducer=reducer, losses={name: {} for name in LOSSES})
    margin = -torch.ones(len(matched))
    distiller.set_matching(position, groups=groups, margin=margin, mean_square=torch.tensor(1.0))
    for size in ((3, 4), (1, 1)):
        check_step(distiller, noise(STUDENT, size), noise(len(matched), size))


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "fcos", "mask_rcnn"])
def test_detectors_on_images_without_objects(detector, tmp_path):
    """All black, too, where the teacher has nothing to say either."""
    base, opts = toy.DETECTORS[detector]
    losses = [
        "MODEL.MGD.LOSS.NAMES",
        str([name for name, _ in POSITION_LOSS_REGISTRY]),
        "MODEL.MGD.POSITIONS",
        "['res4', 'p4']",
    ]
    cfg = toy.distilled_config(toy.save_teacher(tmp_path / "teacher.pth", base), base, opts=[*losses, *opts])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    attach_losses(model)
    batch = toy.batch()
    for entry in batch:
        entry["image"].zero_()
        entry["instances"] = nothing(entry["instances"].image_size)
    backbone = find_distillation(model)
    measurement = backbone.start_matching()
    backbone.measure(model.eval(), batch, measurement)
    measurement.solve()
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert {
        f"loss_{name}_{p}" for name in ("mgd", "l2", "cwd", "pkd", "at", "ab") for p in ("res4", "p4")
    } <= losses.keys()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def nothing(size):
    instances = Instances(size)
    instances.gt_boxes, instances.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.long)
    instances.gt_masks = BitMasks(torch.zeros(0, *size, dtype=torch.bool))
    return instances
