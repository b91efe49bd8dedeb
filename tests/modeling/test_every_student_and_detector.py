"""Every student in every detector: a training step with distillation, and an inference, by config alone."""

import importlib.util

import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from toy import RCNN, RETINANET, STUDENTS

from mgd_det.modeling import attach_losses, find_distillation

EXPANSIONS = {
    "mobilenetv2": {"res2": 144, "res3": 192, "res4": 576, "res5": 960},
    "mobilenetv3_large": {"res2": 72, "res3": 120, "res4": 672, "res5": 960},
    "mobilenetv3_small": {"res3": 88, "res4": 144, "res5": 576},
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {base: toy.save_teacher(folder / f"{i}.pth", base) for i, base in enumerate((RETINANET, RCNN))}


def distilled(teachers, detector, student, opts=(), teacher=None):
    """A detector distilled by the toy teacher of its own kind, or of the base ``teacher``."""
    if student.startswith("timm") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    base, detector_opts = toy.DETECTORS[detector]
    builder, student_opts = STUDENTS[student]
    teacher = teacher or (RCNN if base == RCNN else RETINANET)
    cfg = toy.distilled_config(teachers[teacher], base, builder, [*detector_opts, *student_opts])
    cfg.MODEL.MGD.TEACHER.CONFIG_FILE, cfg.MODEL.MGD.TEACHER.OPTS = teacher, toy.teacher_opts(teacher)
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    model = build_model(cfg)
    attach_losses(model)
    toy.solve_matching(model)
    return model


def step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with EventStorage():
        losses = model.train()(toy.batch())
    sum(losses.values()).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []  # else DistributedDataParallel would need find_unused_parameters
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    return losses


def pairs():
    """Every student with two detectors, of which at least one is an R-CNN; every detector with six students."""
    detectors = list(toy.DETECTORS)
    return [(detectors[(i + j) % 5], student) for i, student in enumerate(STUDENTS) for j in (0, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("detector, student", pairs())
def test_a_step_and_an_inference(teachers, detector, student):
    model = distilled(teachers, detector, student)
    losses = step(model)
    assert [name for name in losses if "mgd" in name] == [f"loss_mgd_res{i}" for i in (2, 3, 4, 5)]
    assert all(torch.isfinite(loss) and loss > 0 for name, loss in losses.items() if "mgd" in name)
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        (result,) = model.eval()(toy.batch(sizes=((75, 101),)))
    instances = result["instances"]
    assert instances.image_size == (75, 101) and torch.isfinite(instances.pred_boxes.tensor).all()
    assert instances.has("pred_masks") == ("mask" in detector)


@pytest.mark.slow
@pytest.mark.parametrize("student", EXPANSIONS)
def test_expansions_as_positions(teachers, student):
    stages = EXPANSIONS[student]
    positions = [f"{stage}.expansion={stage}" for stage in stages]
    model = distilled(teachers, "retinanet", student, ["MODEL.MGD.POSITIONS", str(positions)])
    found = {p.teacher: p.student_channels for p in find_distillation(model).distiller.positions}
    assert found == stages
    assert {f"loss_mgd_{stage}_expansion" for stage in stages} <= set(step(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "detector, teacher", [("retinanet", RCNN), ("fcos", RCNN), ("faster_rcnn", RETINANET), ("mask_rcnn", RETINANET)]
)
def test_teacher_and_student_of_different_detectors(teachers, detector, teacher):
    model = distilled(teachers, detector, "mobilenetv2", teacher=teacher)
    assert step(model)["loss_mgd_res5"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "fcos", "cascade_mask_rcnn"])
def test_fpn_levels_and_stages_mixed_each_with_its_weight(teachers, detector):
    """A Faster R-CNN's p3 to p5 are levels of RetinaNet and FCOS too."""
    opts = [
        "MODEL.MGD.POSITIONS",
        "['res3', 'res5', 'p3', 'p4', 'p5']",
        "MODEL.MGD.LOSS.NAMES",
        "['partial_l2', 'pkd']",
    ]
    opts += ["MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS", "[0.5, 0.5, 0.0, 0.0, 0.0]"]
    opts += ["MODEL.MGD.LOSS.PKD.WEIGHTS", "[0.0, 0.0, 6.0, 6.0, 6.0]"]
    model = distilled(teachers, detector, "shufflenetv2_x0.5", opts, teacher=RCNN)
    losses = step(model)
    names = [name for name in losses if "mgd" in name or "pkd" in name]
    assert names == ["loss_mgd_res3", "loss_mgd_res5", "loss_pkd_p3", "loss_pkd_p4", "loss_pkd_p5"]
    assert 0 < losses["loss_pkd_p4"] <= 12
    level = model.backbone.fpn_output3
    assert level.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_fpn_levels_alone_have_measured_margins(teachers):
    """There is no norm layer to take a margin from."""
    opts = ["MODEL.MGD.POSITIONS", "['p3', 'p4', 'p5', 'p6', 'p7']", "MODEL.FPN.NORM", ""]
    teacher_opts = [*toy.teacher_opts(RETINANET), "MODEL.FPN.NORM", "", "MODEL.FPN.OUT_CHANNELS", "16"]
    state = torch.load(teachers[RETINANET])["model"]
    biases = {
        key.replace(".norm", ""): value for key, value in state.items() if "fpn" in key and key.endswith("norm.bias")
    }
    path = teachers[RETINANET] + ".without_norm"
    torch.save({"model": {**{k: v for k, v in state.items() if ".norm." not in k or "fpn" not in k}, **biases}}, path)
    model = distilled(
        {RETINANET: path}, "retinanet", "mobilenetv2", [*opts, "MODEL.MGD.TEACHER.OPTS", str(teacher_opts)]
    )
    distillation = find_distillation(model)
    for position in distillation.distiller.positions:
        margin = distillation.distiller.margin(position)
        assert (margin <= 0).all() and (margin < 0).any()
    # p7 is one pixel of each image: its mean negative value is the mean of the negative ones among two.
    images = model.preprocess_image(toy.batch())
    with torch.no_grad():
        features = distillation.teacher(images.tensor, images.image_sizes)
    p7 = features["p7"].clamp(max=0).flatten(2).transpose(0, 1).flatten(1)
    expected = p7.sum(dim=1) / (p7 < 0).sum(dim=1).clamp(min=1)
    torch.testing.assert_close(distillation.distiller.margin(distillation.distiller.positions[-1]), expected)
    losses = step(model)
    assert all(losses[f"loss_mgd_p{level}"] > 0 for level in range(3, 8))
