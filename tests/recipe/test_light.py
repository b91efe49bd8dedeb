"""The light student of each kind of teacher: mgd-distill --light."""

import pytest
import torch
from detectron2.modeling import build_model
from fast_cases import fast

from mgd_det import model_zoo
from mgd_det.config import merge_config, without_distillation
from mgd_det.recipe import RunData, find_student, find_teacher, recommended_config
from mgd_det.recipe.light import light_settings
from mgd_det.recipe.recommended import kind_of

NO_DATA = RunData({})
TEACHERS = {
    "RetinaNet": ("COCO-Detection/retinanet_R_50_FPN_3x.yaml", "COCO-Detection/retinanet"),
    "Faster R-CNN": ("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "COCO-Detection/faster_rcnn"),
    "Mask R-CNN": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "COCO-InstanceSegmentation/mask_rcnn"),
}


def shapes_on_meta(cfg):
    cfg = without_distillation(cfg)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build_model(cfg).state_dict().items()}


@pytest.mark.parametrize("kind", fast(TEACHERS))
def test_it_is_the_student_of_the_light_config(kind):
    teacher, prefix = TEACHERS[kind]
    settings = recommended_config(find_teacher(teacher), find_student("mobilenetv2"), NO_DATA, light=True)
    cfg, ours = settings.cfg, model_zoo.get_config(f"{prefix}_MobileNetV2_light_FPN_mgd_R50_1x.yaml")
    assert shapes_on_meta(cfg) == shapes_on_meta(ours)
    for key in ("INHERIT", "POSITIONS", "STUDENT_BACKBONE"):
        assert cfg.MODEL.MGD[key] == ours.MODEL.MGD[key], key
    assert (cfg.MODEL.MGD.MATCHING.KINDS, cfg.MODEL.MGD.LOSS) == (ours.MODEL.MGD.MATCHING.KINDS, ours.MODEL.MGD.LOSS)
    assert "--light" in settings.why("MODEL.FPN.OUT_CHANNELS")


def small_teacher(*opts):
    return merge_config(model_zoo.get_config_file("FashionScenes/Base-RCNN-FPN.yaml"), opts)


@pytest.mark.parametrize("theirs, ours", [(256, 128), (1024, 128), (192, 96), (64, 32), (40, 32)])
def test_the_fpn_has_half_the_teachers_width_and_that_of_the_preset_at_most(theirs, ours):
    assert light_settings(small_teacher("MODEL.FPN.OUT_CHANNELS", theirs))["MODEL.FPN.OUT_CHANNELS"] == ours


@pytest.mark.parametrize("kind, node", [("RetinaNet", "RETINANET"), ("FCOS", "FCOS")])
def test_towers_of_one_channel_a_group_have_another_norm(kind, node):
    def norm(width, theirs):
        opts = ["MODEL.META_ARCHITECTURE", kind, "MODEL.FPN.OUT_CHANNELS", width, f"MODEL.{node}.NORM", theirs]
        return light_settings(merge_config("", opts)).get(f"MODEL.{node}.NORM")

    assert norm(64, "GN") == "LN"
    assert norm(128, "GN") is None and norm(64, "") is None


def test_no_number_is_above_the_teachers():
    found = light_settings(small_teacher("MODEL.ROI_BOX_HEAD.FC_DIM", 100))
    assert found["MODEL.ROI_BOX_HEAD.FC_DIM"] == 100
    assert found["MODEL.ROI_MASK_HEAD.CONV_DIM"] == 64 and found["MODEL.RPN.POST_NMS_TOPK_TEST"] == 100
    assert found["MODEL.ROI_MASK_HEAD.NAME"] == "SeparableMaskHead" and "MODEL.ROI_BOX_HEAD.NAME" not in found


def test_heads_are_separable_where_they_have_convolutions():
    found = light_settings(small_teacher("MODEL.ROI_BOX_HEAD.NUM_CONV", 4, "MODEL.ROI_MASK_HEAD.NUM_CONV", 0))
    assert found["MODEL.ROI_BOX_HEAD.NAME"] == "SeparableConvFCHead" and "MODEL.ROI_MASK_HEAD.NAME" not in found
    assert not any("ROI_MASK_HEAD" in key for key in light_settings(small_teacher("MODEL.MASK_ON", False)))


@pytest.mark.slow
def test_a_light_detector_teaches_one_that_inherits_all_of_its_fpn_and_head(tmp_path):
    base = model_zoo.get_config_file("COCO-Detection/retinanet_MobileNetV3L_light_FPN_1x.yaml")
    (tmp_path / "t.yaml").write_text(f'_BASE_: "{base}"\nMODEL: {{WEIGHTS: "trained.pth"}}')
    teacher = find_teacher(str(tmp_path / "t.yaml"))
    assert kind_of(teacher.cfg) == "RetinaNet"
    cfg = recommended_config(teacher, find_student("shufflenetv2"), NO_DATA).cfg
    ours, theirs = shapes_on_meta(cfg), shapes_on_meta(teacher.cfg)
    outside = {n: s for n, s in theirs.items() if not n.startswith(("backbone.bottom_up", "backbone.fpn_lateral"))}
    outside = {n: s for n, s in outside.items() if not n.startswith("backbone.top_block.p6")}  # from res5
    assert {n: ours[n] for n in outside} == outside and len(outside) > 30


def test_a_light_builder_names_its_student():
    assert find_student("build_fcos_mobilenetv2_separable_fpn_backbone") == find_student("mobilenetv2")
