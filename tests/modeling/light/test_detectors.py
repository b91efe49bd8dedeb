"""Light detectors by config: what they are made of, that they train, and their plain configs and checkpoints."""

import math
import pickle

import detectron2.model_zoo
import pytest
import torch
import toy
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import FPN
from detectron2.utils.events import EventStorage
from fast_cases import fast

from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import class_head, detector_kind, plain_student_config
from mgd_det.config_keys import add_mgd_config
from mgd_det.errors import UserError
from mgd_det.modeling import attach_losses
from mgd_det.modeling.light import (
    SeparableConv2d,
    SeparableFCOSHead,
    SeparableFPN,
    SeparableMaskHead,
    SeparableRetinaNetHead,
    SeparableRPNHead,
    make_separable,
)

RCNN_HEADS = ["MODEL.RPN.HEAD_NAME", "SeparableRPNHead", "MODEL.ROI_BOX_HEAD.NAME", "SeparableConvFCHead"]
RCNN_HEADS += ["MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.CONV_DIM", "8"]
RCNN_HEADS += ["MODEL.ROI_MASK_HEAD.NAME", "SeparableMaskHead"]
LIGHT = {
    "retinanet": (toy.RETINANET, ["MODEL.META_ARCHITECTURE", "SeparableRetinaNet"]),
    "fcos": (toy.FCOS, ["MODEL.META_ARCHITECTURE", "SeparableFCOS"]),
    "mask_rcnn": (toy.RCNN, RCNN_HEADS),
}
SMALL = ["MODEL.MOBILENETS.WIDTH_MULT", "0.25"]


def light_name(base, student):
    return toy.backbone_name(base, student).replace("_fpn_", "_separable_fpn_")


def light_config(detector, student="mobilenetv2", opts=()):
    base, heads = LIGHT[detector]
    return toy.plain_config(base, student, ["MODEL.BACKBONE.NAME", light_name(base, student), *heads, *SMALL, *opts])


def dense_kernels(detector):
    """Names of the convolutions outside the bottom-up network that are neither pointwise nor depthwise."""
    return [
        name
        for name, module in detector.named_modules()
        if isinstance(module, torch.nn.Conv2d) and "bottom_up" not in name
        if max(module.kernel_size) > 1 and module.groups == 1
    ]


@pytest.mark.parametrize("detector", list(LIGHT))
def test_outside_the_bottom_up_network_every_convolution_is_separable(detector):
    light = build_model(light_config(detector))
    assert dense_kernels(light) == []
    names = {name.rpartition(".")[0] for name, m in light.named_modules() if isinstance(m, SeparableConv2d)}
    parts = {
        "retinanet": {"backbone", "backbone.top_block", "head", "head.cls_subnet", "head.bbox_subnet"},
        "mask_rcnn": {"backbone", "proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.mask_head"},
    }
    assert names == parts.get(detector, parts["retinanet"])
    if detector != "mask_rcnn":  # Detectron2's prior: each class has the probability 0.01
        torch.testing.assert_close(light.head.cls_score.bias, torch.full((10,), -math.log(99)).repeat(
            light.head.cls_score.out_channels // 10))  # fmt: skip


@pytest.mark.parametrize("detector", LIGHT)
def test_it_trains_every_weight_and_finds_objects_in_evaluation(detector):
    torch.manual_seed(0)
    light = build_model(light_config(detector, opts=["MODEL.BACKBONE.FREEZE_AT", "0"])).train()
    with EventStorage():
        losses = light(toy.batch())
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    separable = [m for name, m in light.named_modules() if isinstance(m, SeparableConv2d)]
    for module in separable:
        assert module.depthwise.weight.grad is not None and module.weight.grad is not None
    assert sum(bool(m.depthwise.weight.grad.any()) for m in separable) > len(separable) / 2
    with torch.no_grad():
        output = light.eval()(toy.batch())
    assert output[0]["instances"].image_size == (64, 64)


def test_the_forward_of_the_fpn_runs_the_convolutions_that_are_saved():
    fpn = build_model(light_config("retinanet", opts=["MODEL.FPN.NORM", ""])).eval().backbone
    assert isinstance(fpn, SeparableFPN)
    with torch.no_grad():
        for stage, name in ((3, "p3"), (4, "p4"), (5, "p5")):
            layer = fpn.get_submodule(f"fpn_output{stage}")
            layer.weight.zero_()
            layer.bias.fill_(float(stage))
            assert (fpn(torch.randn(1, 3, 64, 64))[name] == stage).all()


@pytest.mark.parametrize("detector", fast(LIGHT))
def test_distilled_it_is_the_plain_light_student(detector, tmp_path):
    base, heads = LIGHT[detector]
    level = "p3"
    opts = [
        *heads,
        *SMALL,
        "MODEL.MGD.STUDENT_BACKBONE",
        light_name(base, "mobilenetv2"),
        "MODEL.FPN.OUT_CHANNELS",
        "8",
    ]
    opts += ["MODEL.MGD.POSITIONS", f"['{level}', 'p4']", "MODEL.MGD.MATCHING.KINDS", "['adapter']"]
    cfg = toy.distilled_config(toy.save_teacher(tmp_path / "t.pth", base), base, "mobilenetv2", opts)
    torch.manual_seed(0)
    distilled = build_model(cfg).train()
    plain_cfg = plain_student_config(cfg)
    torch.manual_seed(0)
    plain = build_model(plain_cfg)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, distilled.state_dict()[name]), name
    assert list(plain.state_dict()) == list(distilled.state_dict())
    attach_losses(distilled)
    toy.solve_matching(distilled)
    with EventStorage():
        losses = distilled(toy.batch())
    (loss,) = [value for name, value in losses.items() if name == f"loss_mgd_{level}"]
    loss.backward()
    gradient = distilled.backbone.fpn_output3.depthwise.weight.grad
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("detector", list(LIGHT))
def test_the_plain_config_is_read_again_by_detectron2(detector, tmp_path):
    cfg = light_config(detector)
    (tmp_path / "student.yaml").write_text(plain_student_config(cfg).dump())
    again = get_cfg()
    add_mgd_config(again)
    again.merge_from_file(str(tmp_path / "student.yaml"))
    shapes = [{n: v.shape for n, v in build_model(c).state_dict().items()} for c in (cfg, again)]
    assert shapes[0] == shapes[1]
    assert class_head(again).NUM_CLASSES == 10
    kind = {"retinanet": "RetinaNet", "fcos": "FCOS", "mask_rcnn": "GeneralizedRCNN"}[detector]
    assert detector_kind(again) == kind


@pytest.mark.parametrize("head", ["ROI_BOX_HEAD", "ROI_MASK_HEAD"])
def test_a_head_without_convolutions_has_none_to_make_separable(head):
    with pytest.raises(UserError, match=rf"MODEL\.{head}\.NAME is 'Separable.*MODEL\.{head}\.NUM_CONV is 0"):
        build_model(light_config("mask_rcnn", opts=[f"MODEL.{head}.NUM_CONV", "0"]))


def test_every_fpn_builder_has_a_light_variant():
    names = {name for name, _ in BACKBONE_REGISTRY if name.startswith("build_") and name.endswith("_fpn_backbone")}
    plain = {name for name in names if "separable" not in name and "regnet" not in name and "swin" not in name}
    assert {name.replace("_fpn_", "_separable_fpn_") for name in plain} == names - plain and len(plain) == 21
    for name in names - plain:
        assert pickle.loads(pickle.dumps(BACKBONE_REGISTRY.get(name))).__name__ == name


@pytest.mark.parametrize("base", fast([toy.RCNN, toy.RETINANET, toy.FCOS]))
def test_the_light_fpn_of_a_resnet_is_that_of_detectron2(base):
    plain, light = (
        build_model(toy.plain_config(base, "resnet", ["MODEL.BACKBONE.NAME", name])).backbone
        for name in (toy.backbone_name(base, "resnet"), light_name(base, "resnet"))
    )
    assert type(plain) is FPN and isinstance(light, FPN) and light.output_shape() == plain.output_shape()
    ours = {name: v for name, v in make_separable(plain).state_dict().items()}
    light.load_state_dict(ours)  # strict
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for name, level in light.eval()(image).items():
            torch.testing.assert_close(level, plain.eval()(image)[name])


def test_a_lazy_config_names_them_as_targets():
    model = detectron2.model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone._target_ = SeparableFPN
    model.backbone.bottom_up.stages.depth = 18
    del model.backbone.bottom_up.stages.stride_in_1x1
    model.backbone.out_channels = 16
    model.proposal_generator.head._target_ = SeparableRPNHead
    model.proposal_generator.head.in_channels = 16
    model.roi_heads.mask_head._target_ = SeparableMaskHead
    model.roi_heads.mask_head.input_shape.channels = model.roi_heads.box_head.input_shape.channels = 16
    model.roi_heads.mask_head.conv_dims = [16, 16, 16]
    model.roi_heads.box_head.fc_dims, model.roi_heads.box_predictor.input_shape.channels = [16], 16
    assert dense_kernels(instantiate(model)) == []
    for file, head in (("retinanet.py", SeparableRetinaNetHead), ("fcos.py", SeparableFCOSHead)):
        model = detectron2.model_zoo.get_config(f"common/models/{file}").model
        model.head._target_ = head
        made = instantiate(model).head
        assert type(made) is head and dense_kernels(made) == []
        torch.testing.assert_close(made.cls_score.bias, torch.full_like(made.cls_score.bias, -math.log(99)))


def test_the_preset_has_the_values_of_its_documentation():
    cfg = read_config("COCO-InstanceSegmentation/mask_rcnn_MobileNetV2_light_FPN_1x.yaml").MODEL
    assert (cfg.FPN.OUT_CHANNELS, cfg.RPN.HEAD_NAME, cfg.RPN.POST_NMS_TOPK_TEST) == (128, "SeparableRPNHead", 300)
    assert (cfg.ROI_BOX_HEAD.FC_DIM, cfg.ROI_MASK_HEAD.NUM_CONV, cfg.ROI_MASK_HEAD.CONV_DIM) == (256, 2, 128)
    for name, node in (("retinanet", "RETINANET"), ("fcos", "FCOS")):
        cfg = read_config(f"COCO-Detection/{name}_MobileNetV2_light_FPN_1x.yaml").MODEL
        assert (cfg.FPN.OUT_CHANNELS, cfg[node].NUM_CONVS) == (128, 3)


def test_the_light_fashion_scenes_config_takes_one_scene():
    # Scenes have 128 x 128 pixels, so p7 has one, and an evaluation has one image in a batch.
    cfg = read_config(
        "FashionScenes/retinanet_MobileNetV2_light_FPN.yaml", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    )
    with torch.no_grad():
        found = build_model(cfg).eval()([{"image": torch.zeros(3, 128, 128, dtype=torch.uint8)}])
    assert len(found) == 1 and found[0]["instances"].image_size == (128, 128)
