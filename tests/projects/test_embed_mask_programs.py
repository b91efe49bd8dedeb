"""EmbedMask's configs and programs: with and without distillation, from yaml and LazyConfig."""

import math
import subprocess
import sys
from pathlib import Path

import embedmask
import pytest
import torch
import toy
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from embedmask import PixelHead
from random_teachers import random_teacher
from toy_embed_mask import BASE, OPTS, PROJECT, config, small_model, step

from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import class_head, detector_kind, plain_student_config
from mgd_det.data import register_coco_folder
from mgd_det.engine import Trainer
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import attach_losses, inherit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in (PROJECT / "configs").rglob("*.yaml") if not p.name.startswith("Base-"))
LAZY = sorted((PROJECT / "configs").rglob("*.py"))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs name each other by paths from there


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
    masks = {"loss_mask", "loss_mask_smooth"} if cfg.MODEL.META_ARCHITECTURE == "EmbedMask" else set()
    assert set(losses) == {*fcos, *masks, *pkd}
    assert bool(masks) == (path.stem != "fcos_R_50_FPN_1x")
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


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


def test_the_program_trains_and_scores_masks(tmp_path):
    flags = toy.write_scenes(tmp_path / "toy", train=4, val=2)
    argv = ["--config-file", BASE, *map(str, flags), *OPTS, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"]
    argv += ["SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "0", "MODEL.FCOS.SCORE_THRESH_TEST", "0.0"]
    argv += ["REPORT.ENABLED", "True"]
    run_program(*argv, "OUTPUT_DIR", str(tmp_path / "run"))
    metrics = (tmp_path / "run" / "metrics.json").read_text()
    assert "segm/AP" in metrics and "loss_mask" in metrics
    assert (tmp_path / "run" / "report.html").exists()
