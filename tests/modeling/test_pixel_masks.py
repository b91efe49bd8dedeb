"""Masks in a training forward: which pixels of which map they weigh, in each kind of detector, and when."""

import copy

import numpy as np
import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from fast_cases import fast
from omegaconf import OmegaConf
from toy import FCOS, RCNN, RETINANET

from mgd_det.distillation import PixelFormat
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import attach_losses, build_teacher, distilled_backbone, find_distillation, pretrained_teacher

# Two images of different size, so that there is padding. Plain features and plain L2: easy to compute by hand.
INPUTS = ((64, 96), (40, 70))
PLAIN = ["MODEL.MGD.NORM", "", "MODEL.MGD.LOSS.NAMES", "['l2']", "MODEL.MGD.LOSS.L2.SCALE", "mean"]
PLAIN += ["MODEL.MGD.LOSS.L2.WEIGHTS", "[1.0]", "MODEL.MGD.POSITIONS", "['res2', 'res3', 'p3', 'p5']"]
PLAIN += ["MODEL.MGD.MATCHING.KINDS", "['adapter']"]  # all channels, and nothing to measure
SCORES = ["MODEL.MGD.LOSS.MASK.NAME", "scores"]
BOXES = ["MODEL.MGD.LOSS.MASK.NAME", "boxes"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """By base, the path of a teacher whose scores differ from pixel to pixel."""
    folder = tmp_path_factory.mktemp("teachers")
    paths = {}
    for i, base in enumerate((RETINANET, FCOS, RCNN)):
        paths[base] = toy.save_teacher(folder / f"{i}.pth", base)
        state = torch.load(paths[base])
        for name, tensor in state["model"].items():
            if ("head." in name and "roi_heads" not in name) and tensor.dim() == 4:
                torch.manual_seed(1)
                torch.nn.init.kaiming_normal_(tensor)
                if "cls_score" in name or "objectness_logits" in name:
                    tensor *= 0.02  # the maps of these networks are large; sigmoids must not saturate
        torch.save(state, paths[base])
    return paths


def config(teachers, base=RETINANET, opts=()):
    cfg = toy.distilled_config(teachers[base], base, opts=[*PLAIN, *opts])
    cfg.MODEL.MGD.TEACHER.FOLD_NORM = False  # nothing but rounding, which the tests need not allow for
    return cfg


def distilled(cfg):
    torch.manual_seed(0)
    detector = build_model(cfg).train()
    attach_losses(detector)
    return detector


def losses_of(detector, inputs=None):
    with EventStorage():
        return detector(inputs or toy.batch(INPUTS))


def step(detector, inputs=None):
    """The losses of a step, and its features (student's behind their adapters) as the losses saw them."""
    distillation, seen = find_distillation(detector), {}
    distillation.observer = lambda student, teacher: seen.update(student=student, teacher=teacher)
    losses = losses_of(detector, inputs)
    distillation.observer = None
    pairs = {}
    for p in distillation.distiller.positions:
        student = distillation.distiller.adapted(p, seen["student"][p.student])
        pairs[p.name] = (student.detach().numpy(), seen["teacher"][p.teacher].numpy())
    return losses, pairs


def check(losses, pairs, weights):
    """Each loss is the sum of its pixels' mean squared errors times ``weights[position]``, (B, H, W)."""
    for name, (student, teacher) in pairs.items():
        expected = (((student - teacher) ** 2).mean(axis=1) * weights[name]).sum()
        assert losses[f"loss_l2_{name}"].item() == pytest.approx(expected, rel=1e-4)


def covered(size, image, padded=(64, 96)):
    """Rows and columns of a map of this size that an image reaches into."""
    return [sum(i * whole / n < length for i in range(n)) for n, length, whole in zip(size, image, padded)]


@pytest.mark.slow
def test_boxes_weigh_each_pixel_as_in_the_paper(teachers):
    detector = distilled(config(teachers, opts=[*BOXES, "MODEL.MGD.LOSS.MASK.BACKGROUND", "0.25"]))
    losses, pairs = step(detector)
    weights = {}
    for name, (student, _) in pairs.items():
        size = student.shape[2:]
        weights[name] = np.zeros((2, *size))
        for of_image, image in zip(weights[name], INPUTS):
            stride = 64 / size[0]
            rows, columns = covered(size, image)
            left, top, right, bottom = 8, 10, 40, 44  # the box of toy.batch(), which ends below the second image
            box = np.zeros(size, bool)
            last_row = min(int(np.ceil(bottom / stride)), rows)
            box[int(top // stride) : last_row, int(left // stride) : int(np.ceil(right / stride))] = True
            outside = ~box
            outside[rows:], outside[:, columns:] = False, False
            of_image[box] = 1 / box.sum()
            of_image[outside] = 0.25 / outside.sum()
        weights[name] /= 2  # images
    assert {p: w.shape[1:] for p, w in weights.items()} == {
        "res2": (16, 24),
        "res3": (8, 12),
        "p3": (8, 12),
        "p5": (2, 3),
    }
    check(losses, pairs, weights)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in find_distillation(detector).parameters())


def scores_by_hand(teacher, base, inputs):
    """Of each level, (B, H, W)."""
    images = teacher.preprocess_image(inputs)
    with torch.no_grad():
        features = teacher.backbone(images.tensor)
        if base == RCNN:
            logits = teacher.proposal_generator.rpn_head([features[f"p{level}"] for level in range(2, 7)])[0]
        else:
            logits = teacher.head([features[f"p{level}"] for level in range(3, 8)])[0]
    return [torch.sigmoid(x.double()).max(dim=1).values.numpy() for x in logits]


@pytest.mark.parametrize("base", [RETINANET, *(pytest.param(base, marks=pytest.mark.slow) for base in (FCOS, RCNN))])
def test_scores_weigh_each_pixel_as_in_the_paper(teachers, base):
    cfg = config(teachers, base, SCORES)
    detector = distilled(cfg)
    losses, pairs = step(detector)
    teacher = build_model(toy.teacher_config(base)).eval()
    teacher.load_state_dict(torch.load(teachers[base])["model"])
    scores = {x.shape[1:]: x for x in scores_by_hand(teacher, base, toy.batch(INPUTS))}
    weights = {}
    for name, (student, _) in pairs.items():
        size = student.shape[2:]
        if size not in scores:  # res2, where the dense detectors have no level: that of p3, interpolated
            assert (name, base != RCNN) == ("res2", True)
            finest = torch.from_numpy(scores[8, 12])[:, None]
            weights[name] = torch.nn.functional.interpolate(finest, size, mode="bilinear")[:, 0].numpy()
        else:
            weights[name] = scores[size].copy()
        rows, columns = covered(size, INPUTS[1])
        weights[name][1, rows:], weights[name][1, :, columns:] = 0, 0
        assert weights[name].std() > 0.01 * weights[name].mean()
        weights[name] /= weights[name].sum()
    check(losses, pairs, weights)
    sum(losses.values()).backward()
    head = find_distillation(detector).teacher.detector
    assert all(p.grad is None for p in head.parameters())


def calls_of(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.slow
def test_the_teachers_head_runs_in_steps_that_distil_and_only_for_scores(teachers):
    detector = distilled(config(teachers, opts=[*SCORES, "MODEL.MGD.INTERVAL", "2", "MODEL.MGD.STOP_ITER", "4"]))
    teacher = find_distillation(detector).teacher.detector
    scores, boxes = calls_of(teacher.head.cls_score), calls_of(teacher.head.bbox_pred)
    distils = []
    for iteration in range(6):
        find_distillation(detector).schedule.set_iteration(iteration, 6)
        before = len(scores)
        losses = losses_of(detector, toy.batch())
        distils.append((len(scores) - before, "loss_l2_res3" in losses))
    assert distils == [(5, True), (0, False), (5, True), (0, False), (0, False), (0, False)]
    assert boxes == []
    detector.eval()(toy.batch())
    assert len(scores) == 10
    for opts in ([], BOXES):
        assert build_teacher(config(teachers, opts=opts)).detector is None


@pytest.mark.slow
def test_a_copy_and_mixed_precision(teachers):
    """Of a detector that has masks; the copy makes its own."""
    detector = distilled(config(teachers, opts=SCORES))
    twin = copy.deepcopy(detector)
    losses, of_twin = losses_of(detector), losses_of(twin)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses_of(detector)
    for name, value in losses.items():
        assert of_twin[name].item() == value.item()
        if name.startswith("loss_l2"):
            assert mixed[name].dtype == torch.float32
            assert mixed[name].item() == pytest.approx(value.item(), rel=0.05)


@pytest.mark.slow
def test_by_keyword_arguments(teachers):
    cfg = config(teachers)
    pixels = PixelFormat.from_config(cfg)
    losses = {"l2": {"weights": 1.0, "scale": "mean"}}
    results = []
    lazy = OmegaConf.create({"name": "boxes", "foreground": 2, "background": 0.0})  # as a LazyConfig has it
    for mask in (None, {"name": ""}, lazy):
        torch.manual_seed(0)
        detector = build_model(toy.plain_config()).train()
        teacher = pretrained_teacher(build_model(toy.teacher_config()).backbone, teachers[RETINANET], pixels)
        options = {"positions": ["res3"], "norm": "", "losses": losses, "matchings": "adapter", "pixel_mask": mask}
        detector.backbone = distilled_backbone(student=detector.backbone, teacher=teacher, pixels=pixels, **options)
        attach_losses(detector)
        losses_of_step, pairs = step(detector, toy.batch())
        results.append((losses_of_step["loss_l2_res3"].item(), pairs))
    assert results[0][0] == results[1][0] != results[2][0]
    value, ((student, target),) = results[2][0], results[2][1].values()
    assert value == pytest.approx(2 * np.mean((student - target)[:, :, 1:6, 1:5] ** 2), rel=1e-4)


MISTAKES = [
    (["MODEL.MGD.LOSS.MASK.NAME", "box"], "MODEL.MGD.LOSS.MASK.NAME is 'box'; use one of boxes, scores"),
    ([*BOXES, "MODEL.MGD.LOSS.MASK.FOREGROUND", "-1.0"], "MODEL.MGD.LOSS.MASK.FOREGROUND is -1.0"),
    ([*BOXES, "MODEL.MGD.LOSS.MASK.BACKGROUND", "1e999"], "MODEL.MGD.LOSS.MASK.BACKGROUND is inf"),
    (
        [*BOXES, "MODEL.MGD.LOSS.MASK.FOREGROUND", "0.0", "MODEL.MGD.LOSS.MASK.BACKGROUND", "0.0"],
        "MODEL.MGD.LOSS.MASK.FOREGROUND is 0",
    ),
    ([*BOXES, "MODEL.MGD.LOSS.NAMES", "[]", "MODEL.MGD.LOGITS.WEIGHT", "1.0"], "LOSS.MASK.NAME .*no position has"),
    (["MODEL.MGD.LOSS.NAMES", "['fsp']", "MODEL.MGD.POSITIONS", "['res3']"], "MODEL.MGD.LOSS.NAMES names 'fsp'"),
    (["MODEL.MGD.LOSS.NAMES", "['ab']", "MODEL.MGD.LOSS.AB.MARGIN", "0.0"], "MODEL.MGD.LOSS.AB.MARGIN is 0.0"),
]


@pytest.mark.parametrize("opts, message", fast(MISTAKES, MISTAKES[0], MISTAKES[4]))
def test_what_the_config_gets_wrong_is_named(teachers, opts, message):
    with pytest.raises(UserError, match=message):
        build_model(config(teachers, opts=opts))


@pytest.fixture(scope="module")
def nets(teachers):
    """A student's backbone without distillation, a teacher, and the student's pixel format."""
    pixels = PixelFormat.from_config(config(teachers))
    teacher = pretrained_teacher(build_model(toy.teacher_config()).backbone, teachers[RETINANET], pixels)
    return build_model(toy.plain_config()).backbone, teacher, pixels


@pytest.mark.parametrize(
    "mask, message",
    [
        ({"name": "boxes", "foregound": 1.0}, "pixel_mask.foregound is unknown.*foreground"),
        ({"foreground": 1.0}, "pixel_mask.name is None"),
        ({"name": "boxes", "background": "0.5"}, "pixel_mask.background is '0.5'"),
        ({"name": "boxes", "foreground": True}, "pixel_mask.foreground is True"),
        ({"name": "boxes", "foreground": float("nan")}, "pixel_mask.foreground is nan"),
    ],
)
def test_what_the_keyword_arguments_get_wrong_is_named(nets, mask, message):
    student, teacher, pixels = nets
    with pytest.raises(ArgumentError, match=message):
        distilled_backbone(student=student, teacher=teacher, pixels=pixels, pixel_mask=mask)


@pytest.mark.slow
def test_a_teacher_without_scores_is_refused(teachers):
    cfg = config(teachers)
    pixels = PixelFormat.from_config(cfg)
    teacher = pretrained_teacher(build_model(toy.teacher_config()).backbone, teachers[RETINANET], pixels)
    options = {"student": build_model(toy.plain_config()).backbone, "teacher": teacher, "pixels": pixels}
    with pytest.raises(ArgumentError, match="pixel_mask.name is 'scores'.*backbone alone"):
        distilled_backbone(**options, pixel_mask={"name": "scores"})
    given = ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]
    cfg = config(teachers, RCNN, SCORES)
    cfg.MODEL.MGD.TEACHER.OPTS = [*cfg.MODEL.MGD.TEACHER.OPTS, *given]
    with pytest.raises(UserError, match="MODEL.MGD.LOSS.MASK.NAME is 'scores'.*GeneralizedRCNN"):
        build_model(cfg)


def test_inputs_without_upright_boxes_are_named(teachers):
    detector = distilled(config(teachers, opts=BOXES))
    inputs = toy.batch()
    inputs[1]["file_name"] = "turned.jpg"
    inputs[1]["instances"].gt_boxes.tensor = torch.zeros(1, 5)
    with pytest.raises(UserError, match="MODEL.MGD.LOSS.MASK.NAME is 'boxes'.*turned.jpg"):
        losses_of(detector, inputs)


@pytest.mark.slow
def test_a_head_of_another_class_gives_its_own_logits(teachers):
    """As a subclass may compute them otherwise than RetinaNet's and FCOS's heads."""
    detector = distilled(config(teachers, opts=SCORES))
    expected = losses_of(detector)
    head = find_distillation(detector).teacher.detector.head
    before = type(head)

    class Other(before):
        def forward(self, features):
            logits, *others = super().forward(features)
            return [-x for x in logits], *others

    head.__class__ = Other
    other = losses_of(detector)
    assert other["loss_l2_p3"].item() != pytest.approx(expected["loss_l2_p3"].item(), rel=1e-3)
