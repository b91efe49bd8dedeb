"""The FPN builders of the students, and detectors built on them by config alone."""

import pickle

import pytest
import torch
from detectron2 import model_zoo
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from mgd_det import add_mgd_config
from mgd_det.errors import UserError

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
BUILDERS = {
    RETINANET: "build_retinanet_mobilenetv2_fpn_backbone",
    MASK_RCNN: "build_mobilenetv2_fpn_backbone",
}


def detector_cfg(base, *opts):
    """The zoo's config with a MobileNetV2 student and heads small enough for a test."""
    cfg = model_zoo.get_config(base)
    add_mgd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.NAME = BUILDERS[base]
    cfg.MODEL.MOBILENETS.NORM = "BN"
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.merge_from_list(list(opts))
    return cfg


def images_64(with_instances):
    generator = torch.Generator().manual_seed(1)
    batch = []
    for _ in range(2):
        image = torch.randint(0, 256, (3, 64, 64), generator=generator).to(torch.uint8)
        batch.append({"image": image, "height": 64, "width": 64})
        if with_instances:
            instances = Instances((64, 64))
            instances.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 36.0, 36.0], [20.0, 10.0, 60.0, 60.0]]))
            instances.gt_classes = torch.tensor([0, 2])
            masks = torch.zeros(2, 64, 64, dtype=torch.bool)
            masks[0, 8:32, 8:32] = True
            masks[1, 15:55, 25:55] = True
            instances.gt_masks = BitMasks(masks)
            batch[-1]["instances"] = instances
    return batch


# By the beginning of a builder's name: the levels and strides.
P2_TO_P6 = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
P3_TO_P7 = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
LEVELS = {"build_": P2_TO_P6, "build_retinanet_": P3_TO_P7, "build_fcos_": P3_TO_P7}
STUDENTS = {
    "mobilenetv1": "MOBILENETS",
    "mobilenetv2": "MOBILENETS",
    "mobilenetv3_large": "MOBILENETS",
    "mobilenetv3_small": "MOBILENETS",
    "shufflenetv2": "SHUFFLENETS",
    "timm": "TIMM",
    "resnet": "RESNETS",
}


def student_cfg(student, prefix):
    """A config whose backbone is the student's FPN of a builder."""
    if student == "timm":
        pytest.importorskip("timm")
    cfg = detector_cfg(MASK_RCNN if prefix == "build_" else RETINANET)
    cfg.MODEL.TIMM.NAME = "mobilenetv3_small_050"
    cfg.MODEL.BACKBONE.NAME = f"{prefix}{student}_fpn_backbone"
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("prefix", LEVELS)
@pytest.mark.parametrize("student", STUDENTS)
def test_levels_declared_and_measured(student, prefix):
    backbone = build_backbone(student_cfg(student, prefix)).eval()
    levels = LEVELS[prefix]
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == levels
    assert {shape.channels for shape in backbone.output_shape().values()} == {32}
    assert backbone.size_divisibility == 32
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        outputs = backbone(image)
        for name, stride in levels.items():
            assert outputs[name].shape == (1, 32, -(-64 // stride), -(-96 // stride))
        # What the levels above p5 are made of.
        source = {
            "build_": lambda: outputs["p5"][:, :, ::2, ::2],
            "build_retinanet_": lambda: backbone.top_block.p6(backbone.bottom_up(image)["res5"]),
            "build_fcos_": lambda: backbone.top_block.p6(outputs["p5"]),
        }[prefix]
        assert torch.equal(outputs["p6"], source())


# Detectron2's own two builders of a ResNet say less.
@pytest.mark.slow
@pytest.mark.parametrize(
    "student, prefix",
    [(student, prefix) for student in STUDENTS for prefix in LEVELS if student != "resnet" or "fcos" in prefix],
)
def test_missing_bottom_up_feature(student, prefix):
    cfg = student_cfg(student, prefix)
    key = f"MODEL.{STUDENTS[student]}.OUT_FEATURES"
    cfg.merge_from_list([key, ["res2", "res3", "res5"]])
    with pytest.raises(UserError) as error:
        build_backbone(cfg)
    for text in ("MODEL.FPN.IN_FEATURES", "return res4;", key):
        assert text in str(error.value)


@pytest.mark.parametrize("student", STUDENTS)
def test_builders_are_functions_with_a_name(student):
    for prefix, suffix in [("", ""), ("", "_fpn"), ("retinanet_", "_fpn"), ("fcos_", "_fpn")]:
        name = f"build_{prefix}{student}{suffix}_backbone"
        builder = BACKBONE_REGISTRY.get(name)
        assert builder.__name__ == builder.__qualname__ == name and builder.__doc__
        assert pickle.loads(pickle.dumps(builder)) is builder


def test_fpn_keys_reach_the_fpn():
    opts = ("MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 64)
    opts += ("MODEL.FPN.IN_FEATURES", ["res4", "res5"], "MODEL.FPN.FUSE_TYPE", "avg")
    backbone = build_backbone(detector_cfg(MASK_RCNN, *opts))
    assert list(backbone.output_shape()) == ["p4", "p5", "p6"]
    assert isinstance(backbone.fpn_lateral4.norm, torch.nn.GroupNorm)
    assert backbone.fpn_output5.out_channels == 64
    assert backbone._fuse_type == "avg"


def test_the_network_alone():
    cfg = detector_cfg(RETINANET, "MODEL.BACKBONE.NAME", "build_mobilenetv2_backbone")
    cfg.MODEL.MOBILENETS.OUT_FEATURES = ["res4"]
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    assert backbone.output_shape() == {"res4": ShapeSpec(channels=96, stride=16)}


@pytest.mark.slow
@pytest.mark.parametrize("base", [RETINANET, MASK_RCNN], ids=["retinanet", "mask_rcnn"])
@pytest.mark.parametrize("in_features", [["res3", "res4"], ["res5", "res4"], ["res3", "res5"], []])
def test_in_features_that_do_not_end_in_res5(base, in_features):
    with pytest.raises(UserError, match='end in "res5"'):
        build_backbone(detector_cfg(base, "MODEL.FPN.IN_FEATURES", in_features))


@pytest.mark.slow
@pytest.mark.parametrize("base", [RETINANET, MASK_RCNN], ids=["retinanet", "mask_rcnn"])
def test_detector_takes_a_training_step(base):
    torch.manual_seed(0)
    model = build_model(detector_cfg(base, "MODEL.BACKBONE.FREEZE_AT", 1)).train()
    before = model.backbone.bottom_up.features[17].conv[2].weight.clone()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=1e-3)
    with EventStorage():
        losses = model(images_64(with_instances=True))
    assert losses and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if name.startswith("backbone.bottom_up."):
            assert parameter.grad.abs().max() > 0, name
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    stem_convs = ("0.0", "1.conv.0.0", "1.conv.1")
    assert frozen == {f"backbone.bottom_up.features.{conv}.weight" for conv in stem_convs}
    optimizer.step()
    assert not torch.equal(model.backbone.bottom_up.features[17].conv[2].weight, before)


@pytest.mark.parametrize("base", [RETINANET, MASK_RCNN], ids=["retinanet", "mask_rcnn"])
def test_detector_infers(base):
    torch.manual_seed(0)
    cfg = detector_cfg(base)
    # An untrained detector is sure of nothing; let it return boxes all the same.
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    model = build_model(cfg).eval()
    with torch.no_grad():
        results = model(images_64(with_instances=False))
    assert len(results) == 2
    for result in results:
        instances = result["instances"]
        assert 0 < len(instances) <= 5
        assert torch.isfinite(instances.pred_boxes.tensor).all()
        assert torch.isfinite(instances.scores).all()
        if base == MASK_RCNN:
            assert instances.pred_masks.shape[1:] == (64, 64)
