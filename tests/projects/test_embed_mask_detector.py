"""EmbedMask as a detector: against FCOS and loops in numpy, with and without distillation, from yaml and LazyConfig."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import embedmask  # noqa: F401  (registers EmbedMask)
import numpy as np
import pytest
import torch
import toy
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from embed_mask_oracle import iou, probability, resized
from embedmask import EmbedMaskHead, PixelHead
from random_teachers import random_teacher
from torch.nn.parallel import DistributedDataParallel

from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import class_head, detector_kind, plain_student_config
from mgd_det.data import register_coco_folder
from mgd_det.engine import Trainer
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import attach_losses, inherit

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "projects" / "EmbedMask"
BASE = str(PROJECT / "configs" / "FashionScenes" / "Base-EmbedMask.yaml")
CONFIGS = sorted(p for p in (PROJECT / "configs").rglob("*.yaml") if not p.name.startswith("Base-"))
LAZY = sorted((PROJECT / "configs").rglob("*.py"))
OPTS = [*toy.SMALL_HEADS, *toy.R18, "MODEL.BACKBONE.NAME", "build_fcos_resnet_fpn_backbone", "MODEL.DEVICE", "cpu"]
OPTS += ["MODEL.EMBED_MASK.DIM", "4", "MODEL.EMBED_MASK.NORM", "BN", "REPORT.ENABLED", "False"]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs name each other by paths from there


def config(*opts):
    return read_config(BASE, [*OPTS, *opts])


def small_model(*opts):
    torch.manual_seed(0)
    return build_model(config(*opts))


def step(model, inputs):
    with EventStorage():
        return model.train()(inputs)


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
def test_places_are_assigned_by_centre_and_size():
    model = small_model()
    features = [torch.zeros(1, 16, size, size) for size in (16, 8, 4, 2, 1)]
    anchors = model.anchor_generator(features)
    boxes = [[4.0, 4, 60, 52], [20, 20, 44, 40], [0, 0, 128, 120]]
    instances = Instances((128, 128), gt_boxes=Boxes(torch.tensor(boxes)))
    expected = []
    for level, size in enumerate((16, 8, 4, 2, 1)):
        stride = 8 * 2**level
        low, high = (0 if level == 0 else 4 * stride), (math.inf if level == 4 else 8 * stride)
        for i, j in itertools.product(range(size), range(size)):
            x, y, fits = (j + 0.5) * stride, (i + 0.5) * stride, []
            for k, (left, top, right, bottom) in enumerate(boxes):
                sides = (x - left, y - top, right - x, bottom - y)
                off = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2))
                if min(sides) > 0 and off < 1.5 * stride and low < max(sides) < high:
                    fits.append(((right - left) * (bottom - top), k))
            expected.append(min(fits)[1] if fits else -1)
    assert set(expected) == {-1, 0, 1, 2}
    assert model._objects_of_places(anchors, instances).tolist() == expected
    assert model._objects_of_places(anchors, instances[[]]).tolist() == [-1] * len(expected)


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
        inputs[index]["instances"] = inputs[index]["instances"][[]]
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


def test_an_object_that_is_hidden_in_the_middle_has_no_mask_loss():
    inputs = toy.batch()
    for image in inputs:  # what is left of it lies beside all positive places
        image["instances"].gt_masks.tensor[:, :, 12:36] = False
    assert step(small_model(), inputs)["loss_mask"] == 0


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


# ------------------------------------------------------------------ configs
@pytest.mark.parametrize("key, value", [
    ("DIM", "2"), ("NUM_CONVS", "-1"), ("PRIOR_DISTANCE", "0.0"), ("BOX_PADDING", "-0.5"), ("MASK_WEIGHT", "-1.0"),
    ("SMOOTH_WEIGHT", "-1.0"), ("MASK_THRESH_TEST", "1.5"),
])  # fmt: skip
def test_a_wrong_value_is_one_message_with_its_key(key, value):
    with pytest.raises(UserError, match=rf"MODEL\.EMBED_MASK\.{key} is {value}"):
        small_model(f"MODEL.EMBED_MASK.{key}", value)


def test_every_key_has_an_effect():
    keys = {"DIM": 5, "NUM_CONVS": 3, "NORM": "", "PRIOR_DISTANCE": 1.0, "MASK_THRESH_TEST": 0.25, "BOX_PADDING": 3.0}
    keys.update(MASK_WEIGHT=1.0, SMOOTH_WEIGHT=0.4)
    defaults, changed = small_model(), {key: small_model(f"MODEL.EMBED_MASK.{key}", str(keys[key])) for key in keys}
    assert changed["DIM"].head.dim == changed["DIM"].pixel_head.dim == 5
    assert len(changed["NUM_CONVS"].pixel_head.tower) == 3
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in changed["NORM"].pixel_head.modules())
    bias = [math.log1p(math.exp(m.head.margin.bias[0].item())) for m in (defaults, changed["PRIOR_DISTANCE"])]
    assert bias == pytest.approx([math.log(2) / 4, math.log(2)], rel=1e-5)
    losses, names = step(defaults, toy.batch()), ("loss_mask", "loss_mask_smooth")
    found = {key: [step(changed[key], toy.batch())[n] / losses[n] for n in names] for key in list(keys)[-3:]}
    assert [x.item() for x in found["MASK_WEIGHT"]] == pytest.approx([2, 1], rel=1e-4)
    assert [x.item() for x in found["SMOOTH_WEIGHT"]] == pytest.approx([1, 4], rel=1e-4)
    assert found["BOX_PADDING"][0] > 1.01  # more pixels that are wrong
    for model, threshold in ((defaults, 0.53), (changed["MASK_THRESH_TEST"], 0.25)):
        found = model._mask_inference(
            torch.full((1, 4, 4), threshold + 0.01), 4, (16, 16), torch.tensor([[0.0, 0, 16, 16]]), (16, 16)
        )
        assert found.all() and threshold == model._mask_inference.threshold


def test_it_needs_masks():
    with pytest.raises(UserError, match="MODEL.MASK_ON is False"):
        small_model("MODEL.MASK_ON", "False")


def test_heads_of_different_dimensions_are_refused():
    model = small_model()
    with pytest.raises(ArgumentError, match="pixel_head.*5.*4"):
        embedmask.EmbedMask(
            backbone=model.backbone,
            head=model.head,
            pixel_head=PixelHead(input_shape=ShapeSpec(channels=16, stride=8), dim=5, norm=""),
            mask_loss=embedmask.MaskLoss(),
            mask_inference=embedmask.MaskInference(),
            num_classes=10,
            pixel_mean=[0, 0, 0],
            pixel_std=[1, 1, 1],
        )


def test_its_keys_stay_with_it_and_leave_other_students():
    cfg = config()
    assert detector_kind(cfg) == "FCOS" and class_head(cfg) is cfg.MODEL.FCOS
    plain = plain_student_config(cfg).MODEL
    assert "EMBED_MASK" in plain and "FCOS" in plain and "MGD" not in plain
    assert "EMBED_MASK" not in plain_student_config(toy.plain_config()).MODEL


@pytest.fixture
def random_teachers(monkeypatch):
    monkeypatch.setattr("mgd_det.modeling.mgd_backbone.build_teacher", random_teacher)
    monkeypatch.setattr("mgd_det.modeling.teachers.build_teacher", random_teacher)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_builds_and_takes_a_step(path, random_teachers):
    cfg = read_config(str(path), ["MODEL.DEVICE", "cpu"])
    folder = {"FashionScenes": "fashion_scenes", "COCO": "coco"}[path.parent.name]
    assert cfg.OUTPUT_DIR == f"./output/embed_mask/{folder}/{path.stem.removeprefix('embed_mask_')}"
    model = build_model(cfg)
    if "_mgd_" in path.stem:
        attach_losses(model)
    losses = step(model, toy.batch(sizes=((64, 64),)))
    pkd = {f"loss_pkd_{position}" for position in cfg.MODEL.MGD.POSITIONS} if "_mgd_" in path.stem else set()
    fcos = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert set(losses) == {*fcos, "loss_mask", "loss_mask_smooth", *pkd}
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.parametrize("path", LAZY, ids=lambda path: path.stem)
def test_a_lazy_config_is_the_yaml_config(path, random_teachers):
    lazy, cfg = LazyConfig.load(str(path)), read_config(str(path.with_suffix(".yaml")), ["MODEL.DEVICE", "cpu"])
    models = []
    for build in (lambda: instantiate(lazy.model), lambda: build_model(cfg)):
        torch.manual_seed(5)
        models.append(build())
        if "_mgd_" in path.stem:
            attach_losses(models[-1])
    assert [(n, tuple(p.shape)) for n, p in models[0].named_parameters()] == [
        (n, tuple(p.shape)) for n, p in models[1].named_parameters()
    ]
    models[0].load_state_dict(models[1].state_dict())
    losses = [step(model, toy.batch(sizes=((64, 64),))) for model in models]
    assert set(losses[0]) == set(losses[1])
    for name, loss in losses[0].items():
        assert loss.item() == pytest.approx(losses[1][name].item(), rel=1e-5), name
    for name in ("test_score_thresh", "test_nms_thresh", "test_topk_candidates", "max_detections_per_image"):
        assert getattr(models[0], name) == getattr(models[1], name), name
    assert models[0]._mask_inference.threshold == models[1]._mask_inference.threshold == 0.53
    assert models[0].center_sampling_radius == 1.5 and models[0].test_nms_thresh == 0.6
    assert lazy.optimizer.lr == cfg.SOLVER.BASE_LR and lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert list(lazy.train.get("inherit", [])) == cfg.MODEL.MGD.INHERIT
    mapper = lazy.dataloader.train.mapper
    assert mapper.use_instance_mask and mapper.instance_mask_format == cfg.INPUT.MASK_FORMAT == "bitmask"


def test_a_student_inherits_everything_outside_the_bottom_up_of_its_teacher():
    teacher, student = small_model(*toy.NARROW_R50).state_dict(), small_model()
    report = inherit(student, teacher, ["fpn", "head"])
    assert not report.not_in_student and not report.not_in_teacher
    assert {"pixel_head.embedding.weight", "head.embedding.weight", "head.margin.bias"} <= set(report.inherited)
    # Only what reads the bottom-up network is of another size.
    assert all(name.startswith("backbone.fpn_lateral") for name in report.other_shape)


@pytest.mark.parametrize("base", [toy.RCNN, toy.FCOS, toy.RETINANET])
def test_detectors_of_other_kinds_teach(base, tmp_path):
    weights = toy.save_teacher(tmp_path / "teacher.pth", base)
    opts = ["MODEL.BACKBONE.NAME", "build_mgd_backbone", "MODEL.MGD.STUDENT_BACKBONE", "build_fcos_resnet_fpn_backbone"]
    opts += ["MODEL.MGD.TEACHER.CONFIG_FILE", base, "MODEL.MGD.TEACHER.OPTS", str(toy.teacher_opts(base))]
    opts += ["MODEL.MGD.POSITIONS", "['p3', 'p4', 'p5']", "MODEL.MGD.LOSS.NAMES", "['pkd']"]
    opts += ["MODEL.MGD.LOGITS.WEIGHT", str(float(base == toy.FCOS))]
    student = small_model(*opts, "MODEL.MGD.TEACHER.WEIGHTS", weights)
    attach_losses(student)
    losses = step(student, toy.batch())
    assert {name for name in losses if name.startswith("loss_pkd")} == {"loss_pkd_p3", "loss_pkd_p4", "loss_pkd_p5"}
    assert ("loss_kd_logits" in losses) == (base == toy.FCOS)
    report = inherit(student, torch.load(weights)["model"], ["fpn", "head"] if base == toy.FCOS else ["fpn"])
    assert any(name.startswith("backbone.fpn_output") for name in report.inherited)
    if base == toy.FCOS:
        # All but the embeddings is FCOS's.
        new = {name.rpartition(".")[0] for name in report.not_in_teacher}
        assert all(name.startswith(("pixel_head.", "head.embedding", "head.margin")) for name in new) and new


# ------------------------------------------------------------------ programs
@pytest.mark.slow
def test_a_training_resumes_with_equal_tensors(tmp_path):
    _, annotations, _, images, *_ = toy.write_scenes(tmp_path / "toy", train=6, val=1)
    teacher = small_model(*toy.NARROW_R50)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    opts = ["DATASETS.TRAIN", "('embed_mask_resume',)", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2", "SEED", "5"]
    opts += ["SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001", "SOLVER.CHECKPOINT_PERIOD", "2"]
    opts += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path), "MODEL.BACKBONE.NAME", "build_mgd_backbone"]
    opts += ["MODEL.MGD.STUDENT_BACKBONE", "build_fcos_resnet_fpn_backbone", "MODEL.MGD.INHERIT", "['fpn', 'head']"]
    opts += ["MODEL.MGD.TEACHER.CONFIG_FILE", BASE, "MODEL.MGD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")]
    opts += ["MODEL.MGD.TEACHER.OPTS", str([*OPTS, *toy.NARROW_R50]), "MODEL.MGD.POSITIONS", "['p3', 'p4', 'p5']"]
    opts += ["MODEL.MGD.LOSS.NAMES", "['pkd']", "MODEL.MGD.LOGITS.WEIGHT", "0.5"]
    cfg = config(*opts)
    register_coco_folder("embed_mask_resume", annotations, images)
    try:
        for resume in (False, True):
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=resume)
            assert trainer.start_iter == (2 if resume else 0)
            trainer.train()
            if not resume:
                uninterrupted = torch.load(tmp_path / "model_final.pth")["model"]
                (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    finally:
        DatasetCatalog.remove("embed_mask_resume")
    resumed = torch.load(tmp_path / "model_final.pth")["model"]
    assert list(resumed) == list(build_model(plain_student_config(cfg)).state_dict())
    assert all(torch.equal(value, uninterrupted[name]) for name, value in resumed.items())


def run_program(*argv):
    done = subprocess.run([sys.executable, str(PROJECT / "train_net.py"), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_the_program_trains_what_a_lazy_config_describes(tmp_path):
    flags = toy.write_scenes(tmp_path / "toy", train=2, val=1)
    argv = ["--config-file", str(PROJECT / "configs" / "COCO" / "embed_mask_MobileNetV2_FPN_1x.py"), *map(str, flags)]
    # Images keep their size of 64 x 64.
    argv += ["dataloader.train.mapper.augmentations=[]", "dataloader.test.mapper.augmentations=[]"]
    argv += ["dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    argv += [
        "train.init_checkpoint=''",
        "train.max_iter=1",
        "model.test_score_thresh=0.0",
        "train.report.enabled=False",
    ]
    run_program(*argv, f"train.output_dir={tmp_path / 'run'}")
    metrics = (tmp_path / "run" / "metrics.json").read_text()
    assert "segm/AP" in metrics and "loss_mask_smooth" in metrics


@pytest.mark.slow
def test_the_program_trains_and_scores_masks(tmp_path):
    flags = toy.write_scenes(tmp_path / "toy", train=4, val=2)
    argv = ["--config-file", BASE, *map(str, flags), *OPTS, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"]
    argv += ["SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "0", "MODEL.FCOS.SCORE_THRESH_TEST", "0.0"]
    argv += ["REPORT.ENABLED", "True"]
    run_program(*argv, "OUTPUT_DIR", str(tmp_path / "run"))
    metrics = (tmp_path / "run" / "metrics.json").read_text()
    assert "segm/AP" in metrics and "loss_mask" in metrics
    assert (tmp_path / "run" / "report.html").exists()
