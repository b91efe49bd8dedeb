"""Every config that comes with the project builds, and says what its name says."""

import pytest
import torch
from detectron2.modeling import build_model

from mgd_det import model_zoo
from mgd_det.config import MGD_BACKBONE, without_distillation
from mgd_det.engine import read_config
from mgd_det.errors import UserError
from mgd_det.modeling.backbone import find_mgd_backbone
from mgd_det.modeling.teacher import teacher_config

NAMES = model_zoo.config_names()
WHOLE = [name for name in NAMES if "Base-" not in name]


def test_all_folders_are_found():
    assert {name.split("/")[0] for name in WHOLE} == {
        "COCO-Detection",
        "COCO-InstanceSegmentation",
        "FashionScenes",
        "demo",
        "quick_schedules",
    }


@pytest.mark.parametrize("name", WHOLE)
def test_every_config_builds(name, tmp_path, monkeypatch):
    cfg = read_config(name)
    cfg.MODEL.DEVICE = "cpu"
    assert ("_mgd_" in name) == (cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE)
    plain = build_model(without_distillation(cfg))
    if "_mgd_" not in name:
        return
    # The teacher's weights come from a file made here; the config's own are downloads or results.
    monkeypatch.setattr("mgd_det.modeling.teacher.detectron2.model_zoo.get_checkpoint_url", lambda name: "zoo.pkl")
    teacher = teacher_config(cfg)
    assert teacher.MODEL.WEIGHTS == (cfg.MODEL.MGD.TEACHER.WEIGHTS or "zoo.pkl")
    teacher.MODEL.DEVICE = "cpu"
    torch.save({"model": build_model(teacher).state_dict()}, tmp_path / "teacher.pth")
    cfg.MODEL.MGD.TEACHER.WEIGHTS = str(tmp_path / "teacher.pth")
    detector = build_model(cfg)
    assert list(detector.state_dict()) == list(plain.state_dict())
    channels = [(p.student_channels, p.teacher_channels) for p in find_mgd_backbone(detector).distiller.positions]
    student = [64, 128, 256, 512] if "R_18" in name else [24, 32, 96, 320]
    width = 128 if name.startswith("demo") else 256
    assert channels == list(zip(student, [width, 2 * width, 4 * width, 8 * width]))


def test_the_coco_recipe_is_the_authors():
    cfg = read_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml")
    matching = cfg.MODEL.MGD.MATCHING
    assert (matching.PERIODS, matching.MILESTONES, matching.NUM_BATCHES) == ([5000, 31000], [20000], 1000)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.BASE_LR) == (90000, (60000, 80000), 0.01)
    assert (cfg.SOLVER.NESTEROV, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.INPUT.FORMAT) == (True, 1, "RGB")


def test_anchor_sizes_are_those_of_detectron2s_retinanet():
    import detectron2.model_zoo

    theirs = detectron2.model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    ours = read_config("COCO-Detection/retinanet_R_18_FPN_1x.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    for mine, their in zip(ours, theirs):
        assert mine == pytest.approx(their, rel=1e-4)


def test_names_and_paths_and_mistakes():
    path = model_zoo.get_config_file("demo/retinanet_R_50_FPN.yaml")
    assert model_zoo.find_config_file(path) == path == model_zoo.find_config_file("demo/retinanet_R_50_FPN.yaml")
    assert "detectron2" in model_zoo.find_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    with pytest.raises(UserError, match="no config 'demo/retinanet_R_5_FPN.yaml'. Did you mean demo/retinanet_R_50"):
        model_zoo.get_config_file("demo/retinanet_R_5_FPN.yaml")
