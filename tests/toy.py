"""Small detectors and data for the tests: seconds to train, and nothing to download."""

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from mgd_det.cli.yaml_setup import read_config, use_available_device
from mgd_det.data import FashionPhotos, SceneSpec, register_coco_folder, write_fashion_scenes
from mgd_det.modeling import find_distillation

RETINANET = "FashionScenes/Base-RetinaNet.yaml"
RCNN = "FashionScenes/Base-RCNN-FPN.yaml"
FCOS = "FashionScenes/Base-FCOS.yaml"
# What makes each of Detectron2's detectors of these bases, with masks of the R-CNNs where they have any.
DETECTORS = {
    "retinanet": (RETINANET, []),
    "fcos": (FCOS, []),
    "faster_rcnn": (RCNN, ["MODEL.MASK_ON", "False"]),
    "mask_rcnn": (RCNN, []),
    "cascade_mask_rcnn": (
        RCNN,
        ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"],
    ),
}

# Part of the builder's name, and overrides that choose the network.
STUDENTS = {
    **{f"R{depth}": ("resnet", ["MODEL.RESNETS.DEPTH", str(depth)]) for depth in (18, 34)},
    **{
        f"R{depth}": ("resnet", ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"])
        for depth in (50, 101)
    },
    **{name: (name, []) for name in ("mobilenetv1", "mobilenetv2", "mobilenetv3_large", "mobilenetv3_small")},
    **{
        f"shufflenetv2_x{width}": ("shufflenetv2", ["MODEL.SHUFFLENETS.WIDTH_MULT", str(width)])
        for width in (0.5, 1.0, 1.5, 2.0)
    },
    **{
        f"timm_{name}": ("timm", ["MODEL.TIMM.NAME", name])
        for name in ("efficientnet_b0", "mobilenetv4_conv_small", "convnext_atto")
    },
}
# A ResNet-50 of half the width: 128/256/512/1024 channels at res2..res5, twice those of ResNet-18.
NARROW_R50 = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"]
NARROW_R50 += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "128", "MODEL.RESNETS.WIDTH_PER_GROUP", "32"]
R18 = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
SMALL_HEADS = ["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]
# Batch norm, whose state and margins have more to test than group norm's.
for _part in ("RESNETS", "MOBILENETS", "SHUFFLENETS", "TIMM", "FPN", "RETINANET", "FCOS"):
    SMALL_HEADS += [f"MODEL.{_part}.NORM", "BN"]


def backbone_name(base: str, student: str) -> str:
    """The plain FPN builder of "resnet", "mobilenetv2"... for the detector of ``base``."""
    prefix = {RETINANET: "retinanet_", FCOS: "fcos_", RCNN: ""}[base]
    return f"build_{prefix}{student}_fpn_backbone"


def plain_opts(base: str = RETINANET, student: str = "resnet") -> list:
    # A report takes longer than such a training.
    name = ["MODEL.BACKBONE.NAME", backbone_name(base, student)]
    return [*SMALL_HEADS, *R18, *name, "REPORT.ENABLED", "False"]


def plain_config(base: str = RETINANET, student: str = "resnet", opts=()) -> CfgNode:
    cfg = read_config(base, [*plain_opts(base, student), *opts])
    use_available_device(cfg)
    return cfg


def teacher_config(base: str = RETINANET, opts=()) -> CfgNode:
    return plain_config(base, "resnet", [*NARROW_R50, *opts])


def teacher_opts(base: str = RETINANET) -> list:
    """The same teacher as overrides of ``base``, for MODEL.MGD.TEACHER.OPTS."""
    return [*SMALL_HEADS, *NARROW_R50, "MODEL.BACKBONE.NAME", backbone_name(base, "resnet")]


def save_teacher(path: Path, base: str = RETINANET) -> str:
    """Writes a checkpoint of a random teacher whose norm layers look trained; returns its path."""
    torch.manual_seed(7)
    teacher = build_model(teacher_config(base))
    randomize_norms(teacher)
    torch.save({"model": teacher.state_dict()}, path)
    return str(path)


def randomize_norms(module: torch.nn.Module) -> None:
    for submodule in module.modules():
        if getattr(submodule, "running_mean", None) is not None and submodule.weight is not None:
            submodule.running_mean.normal_(0, 0.2)
            submodule.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(submodule.weight, 0.5, 1.5)
            torch.nn.init.normal_(submodule.bias, 0, 0.3)


def distilled_opts(weights: str, base: str = RETINANET, student: str = "resnet") -> list:
    """Overrides of ``base`` for a student that the teacher of :func:`save_teacher` teaches."""
    mgd = ["MODEL.BACKBONE.NAME", "build_mgd_backbone", "MODEL.MGD.STUDENT_BACKBONE", backbone_name(base, student)]
    mgd += ["MODEL.MGD.TEACHER.CONFIG_FILE", base, "MODEL.MGD.TEACHER.WEIGHTS", weights]
    mgd += ["MODEL.MGD.TEACHER.OPTS", str(teacher_opts(base)), "MODEL.MGD.NORM_GROUPS", "8"]
    mgd += ["MODEL.MGD.MATCHING.PERIODS", "[2]", "MODEL.MGD.MATCHING.MILESTONES", "[]"]
    return [*mgd, "MODEL.MGD.MATCHING.NUM_BATCHES", "1"]


def distilled_config(weights: str, base: str = RETINANET, student: str = "resnet", opts=()) -> CfgNode:
    return plain_config(base, student, [*distilled_opts(weights, base, student), *opts])


def batch(sizes=((64, 64), (64, 64)), seed: int = 0) -> list:
    """Inputs as Detectron2's DatasetMapper makes them: an object with its mask in every image."""
    rng = np.random.default_rng(seed)
    inputs = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 10.0, 40.0, 44.0]]))
        instances.gt_classes = torch.tensor([3])
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[:, 10:44, 8:40] = True
        instances.gt_masks = BitMasks(mask)
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def solve_matching(detector: torch.nn.Module) -> None:
    """Matches the channels of a detector with distillation, as of one batch."""
    find_distillation(detector).solve_matching(detector, [batch()])


def write_scenes(root: Path, train: int = 16, val: int = 8) -> list:
    """Writes scenes of drawn shapes, 64 x 64; returns the flags of tools/train_net.py that use them."""
    y, x = np.mgrid[:28, :28] - 13.5
    shapes = [x**2 + y**2 < 120, (abs(x) < 9) & (abs(y) < 9), abs(x) + abs(y) < 12, (abs(x) < 5) & (abs(y) < 12)]
    photos = FashionPhotos(np.stack([(shape * 220).astype(np.uint8) for shape in shapes]), np.arange(4))
    write_fashion_scenes(root, SceneSpec("toy", train, val, 64), photos, photos, workers=1)
    flags = []
    for split in ("train", "val"):
        flags += [f"--{split}-json", str(root / "annotations" / f"instances_{split}.json")]
        flags += [f"--{split}-images", str(root / "images" / split)]
    return flags


@contextmanager
def registered_scenes(root: Path, name: str, train: int) -> Iterator[list]:
    """Registers such scenes for a ``with`` block; its value are the overrides of a config that trains on them."""
    _, annotations, _, images, *_ = write_scenes(root, train=train, val=1)
    register_coco_folder(name, annotations, images)
    yield ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"]
    DatasetCatalog.remove(name)
