"""Every yaml config that comes with the project builds, and says what its name says."""

import itertools
import re
from pathlib import Path

import detectron2.model_zoo
import numpy as np
import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.structures import Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import Detectron2Handler
from fast_cases import fast
from random_teachers import random_teacher

from mgd_det import model_zoo
from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import MGD_BACKBONE, detector_kind, without_distillation
from mgd_det.errors import UserError
from mgd_det.modeling import attach_losses, find_distillation, teacher_config

NAMES = [name for name in model_zoo.config_names() if name.endswith(".yaml")]
WHOLE = [name for name in NAMES if not Path(name).name.startswith("Base-")]
COCO = [name for name in WHOLE if name.startswith("COCO")]
DISTILLED = [name for name in WHOLE if "_mgd_" in name]
MODEL_ZOO = Path(__file__).parents[1] / "MODEL_ZOO.md"

STUDENTS = {  # builder, weights, channels of res2 to res5
    "R_18": ("resnet", "torchvision://resnet18", [64, 128, 256, 512]),
    "R_50": ("resnet", "torchvision://resnet50", [256, 512, 1024, 2048]),
    "R_50_torchvision": ("resnet", "torchvision://resnet50", [256, 512, 1024, 2048]),
    "MobileNetV2": ("mobilenetv2", "torchvision://mobilenet_v2", [24, 32, 96, 320]),
    "MobileNetV3L": ("mobilenetv3_large", "torchvision://mobilenet_v3_large", [24, 40, 112, 160]),
    "ShuffleNetV2": ("shufflenetv2", "torchvision://shufflenet_v2_x1_0", [24, 116, 232, 464]),
}
DETECTORS = {  # meta-architecture, masks, box heads, prefix of the builder
    "retinanet": ("RetinaNet", False, None, "retinanet_"),
    "fcos": ("FCOS", False, None, "fcos_"),
    "faster_rcnn": ("GeneralizedRCNN", False, "StandardROIHeads", ""),
    "mask_rcnn": ("GeneralizedRCNN", True, "StandardROIHeads", ""),
    "cascade_mask_rcnn": ("GeneralizedRCNN", True, "CascadeROIHeads", ""),
    "keypoint_rcnn": ("GeneralizedRCNN", False, "StandardROIHeads", ""),
}
SCHEDULES = {
    "1x": (90000, (60000, 80000)),
    "3x": (270000, (210000, 250000)),
    "finetune": (30000, (20000, 26000)),
}
PARTS = re.compile(
    rf"(?P<detector>{'|'.join(DETECTORS)})_(?P<student>{'|'.join(STUDENTS)})(?P<light>_light)?(?P<narrow>_narrow)?_FPN"
    r"(_mgd_(?P<teacher_detector>(faster|cascade_mask)_rcnn_)?(?P<teacher>R50|R101|X101))?"
    r"(_(?P<variant>pkd|logits|recommended))?(_(?P<schedule>1x|3x|finetune|quick|instant_test))?"
)


def parts(name):
    match = PARTS.fullmatch(Path(name).stem)
    assert match, f"{name} is not named as its neighbours are"
    return match.groupdict()


def channels(name):
    """Student's and teacher's channels at each position, by the config's name."""
    part = parts(name)
    if part["light"] or part["narrow"]:  # levels of the FPN
        return [(128, 256)] * 4 if name.startswith("COCO") else [(32, 64)] * 3
    if part["variant"] in ("pkd", "recommended"):  # levels of the FPN
        return [(256, 256)] * 4 if name.startswith("COCO") else [(64, 64)] * 3
    if name.startswith("demo"):  # the recommended recipe: FPN levels
        return [(64, 64)] * 3
    width = 128 if part["schedule"] == "quick" else 256
    pairs = list(zip(STUDENTS[part["student"]][2], [width, 2 * width, 4 * width, 8 * width]))
    return pairs[1:] if part["student"] == "ShuffleNetV2" else pairs


def build_on_meta(cfg):
    """The model without memory or time for its weights: names and shapes."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def model_zoo_row(name):
    """The cells of the line of MODEL_ZOO.md that has this distilled config."""
    rows = [line for line in MODEL_ZOO.read_text().splitlines() if f"[yaml](configs/{name})" in line]
    assert len(rows) == 1, rows
    return [cell.strip() for cell in rows[0].strip("| ").split("|")]


def test_all_folders_are_found():
    assert {name.split("/")[0] for name in WHOLE} == {
        "COCO-Detection",
        "COCO-InstanceSegmentation",
        "COCO-Keypoints",
        "FashionScenes",
        "demo",
        "quick_schedules",
    }
    assert len(DISTILLED) > 40


@pytest.mark.parametrize("name", [name for name in model_zoo.config_names() if name.startswith("COCO")])
def test_no_config_hides_one_of_detectron2s(name):
    # A teacher's config is found by name, ours first.
    with pytest.raises(RuntimeError, match="not available in Model Zoo"):
        detectron2.model_zoo.get_config_file(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WHOLE if name not in DISTILLED])
def test_every_plain_config_builds(name):
    cfg = model_zoo.get_config(name)
    assert cfg.MODEL.BACKBONE.NAME != MGD_BACKBONE
    model = build_on_meta(cfg)
    assert list(model.backbone.output_shape()) == (
        ["p3", "p4", "p5", "p6", "p7"] if parts(name)["detector"] in ("retinanet", "fcos") else
        ["p2", "p3", "p4", "p5", "p6"]
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTILLED)
def test_every_distilled_config_builds(name, monkeypatch):
    monkeypatch.setattr("mgd_det.modeling.mgd_backbone.build_teacher", random_teacher)
    for fill in ("kaiming_uniform_", "kaiming_normal_", "normal_", "trunc_normal_"):  # half of the time
        monkeypatch.setattr(torch.nn.init, fill, lambda tensor, *args, **options: tensor)
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    assert cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE
    detector = build_model(cfg)
    plain = build_on_meta(without_distillation(cfg))
    if name in COCO:
        assert float(model_zoo_row(name)[3]) == round(sum(p.numel() for p in plain.parameters()) / 1e6, 1)
    positions = find_distillation(detector).distiller.positions
    assert [(p.student_channels, p.teacher_channels) for p in positions] == channels(name)
    assert list(shapes(detector).items()) == list(shapes(plain).items())


@pytest.mark.parametrize("name", fast(WHOLE, *WHOLE[::5]))
def test_a_config_is_what_its_name_says(name):
    cfg, part = without_distillation(model_zoo.get_config(name)), parts(name)
    meta_architecture, masks, heads, prefix = DETECTORS[part["detector"]]
    assert (detector_kind(cfg), cfg.MODEL.MASK_ON) == (meta_architecture, masks)
    assert heads in (None, cfg.MODEL.ROI_HEADS.NAME)
    assert cfg.MODEL.KEYPOINT_ON == (part["detector"] == "keypoint_rcnn")
    network, weights, _ = STUDENTS[part["student"]]
    fpn = "separable_fpn" if part["light"] else "fpn"
    assert cfg.MODEL.BACKBONE.NAME == f"build_{prefix}{network}_{fpn}_backbone"
    head = cfg.MODEL.RPN.HEAD_NAME if meta_architecture == "GeneralizedRCNN" else cfg.MODEL.META_ARCHITECTURE
    assert head.startswith("Separable") == bool(part["light"])
    if network == "resnet":
        assert cfg.MODEL.RESNETS.DEPTH == int(part["student"].split("_")[1])
    if not name.startswith("demo"):
        assert Path(cfg.OUTPUT_DIR).name == Path(name).stem
    if name in COCO:
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == SCHEDULES[part["schedule"]]
        rate = 0.01 if meta_architecture in ("RetinaNet", "FCOS") else 0.02
        assert cfg.SOLVER.BASE_LR == (rate / 10 if part["schedule"] == "finetune" else rate)
        assert (cfg.MODEL.WEIGHTS == weights) == (part["schedule"] != "finetune")


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTILLED)
def test_a_teacher_is_what_the_name_says(name):
    cfg, part = model_zoo.get_config(name), parts(name)
    config_file = Path(cfg.MODEL.MGD.TEACHER.CONFIG_FILE)
    expected = (part["teacher_detector"] or "").rstrip("_") or part["detector"]
    if name in COCO and expected == "fcos":
        expected = "retinanet"  # Detectron2 has no trained FCOS
    kind, depth = part["teacher"][0], part["teacher"][1:]
    groups = 32 if kind == "X" else 1
    assert config_file.name.startswith(f"{expected}_{kind}_{depth}_{'32x8d_' if kind == 'X' else ''}FPN")
    teacher = teacher_config(cfg)
    assert (teacher.MODEL.RESNETS.DEPTH, teacher.MODEL.RESNETS.NUM_GROUPS) == (int(depth), groups)
    if name in COCO:
        assert teacher.MODEL.WEIGHTS == detectron2.model_zoo.get_checkpoint_url(str(config_file))
        longest = part["student"] != "R_18" or part["detector"] != "retinanet" or part["schedule"] == "3x"
        assert config_file.stem.endswith("3x" if longest else "1x")
    elif str(config_file).startswith("demo"):  # the file that comes with the project
        assert teacher.MODEL.WEIGHTS == f"configs/demo/{config_file.stem}.safetensors"
        assert (Path(__file__).parents[1] / teacher.MODEL.WEIGHTS).is_file()
    else:  # what the teacher's own config leaves behind
        if part["schedule"] == "instant_test":
            config_file = Path(f"quick_schedules/{config_file.stem}_instant_test.yaml")
        own = model_zoo.get_config(str(config_file)).OUTPUT_DIR
        assert Path(teacher.MODEL.WEIGHTS) == Path(own) / "model_final.pth"


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["R101", "X101", "cascade_mask_rcnn_R50"])
def test_what_fits_is_inherited_of_a_stronger_teacher(teacher):
    student = "MobileNetV2" if "cascade" in teacher else "R_50"
    cfg = model_zoo.get_config(f"COCO-InstanceSegmentation/mask_rcnn_{student}_FPN_mgd_{teacher}_recommended_1x.yaml")
    assert cfg.MODEL.MGD.INHERIT == ["fpn", "head"]
    theirs = shapes(build_on_meta(teacher_config(cfg)))
    ours = shapes(build_on_meta(without_distillation(cfg)))
    heads = {name for name in ours if not name.startswith("backbone.")}
    # A cascade has three box heads, which have other names.
    left_out = {name for name in heads if name.startswith("roi_heads.box_") and "cascade" in teacher}
    fits = {name for name in heads if ours[name] == theirs.get(name)}
    assert fits == heads - left_out and "roi_heads.mask_head.mask_fcn1.weight" in fits
    assert {name for name in ours if "fpn_output" in name and ours[name] == theirs.get(name)} == {
        f"backbone.fpn_output{level}.{part}" for level in (2, 3, 4, 5) for part in ("weight", "bias")
    }


def test_the_teacher_of_32_groups_has_its_own_pixels():
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_mgd_X101_recommended_1x.yaml")
    teacher = teacher_config(cfg)
    assert (cfg.INPUT.FORMAT, teacher.INPUT.FORMAT) == ("RGB", "BGR")
    assert list(teacher.MODEL.PIXEL_STD) == [57.375, 57.12, 58.395]
    assert list(cfg.MODEL.PIXEL_STD) == [58.395, 57.12, 57.375]
    assert teacher.MODEL.PIXEL_MEAN == pytest.approx(cfg.MODEL.PIXEL_MEAN[::-1], abs=0.2)


@pytest.mark.slow
def test_the_table_has_every_coco_config():
    linked = set(re.findall(r"\(configs/(\S+?)\)", MODEL_ZOO.read_text()))
    assert linked == {name for name in model_zoo.config_names() if name.startswith("COCO")}
    for name in (name for name in COCO if name in DISTILLED):
        _, teacher, schedule, *_ = model_zoo_row(name)
        assert teacher.strip("`") == Path(model_zoo.get_config(name).MODEL.MGD.TEACHER.CONFIG_FILE).stem
        assert schedule.split(",")[0] == parts(name)["schedule"]


LONG = [name for name in DISTILLED if name.endswith(("_1x.yaml", "_3x.yaml"))]


@pytest.mark.parametrize("name", fast(LONG, *LONG[::5]))
def test_with_and_without_distillation_the_student_is_trained_alike(name):
    part = parts(name)
    student = "R_50_torchvision" if part["student"] == "R_50" else part["student"]
    plain = f"{Path(name).parent}/{part['detector']}_{student}{part['light'] or ''}_FPN_{part['schedule']}.yaml"
    cfgs = [without_distillation(model_zoo.get_config(n)) for n in (name, plain)]
    for cfg in cfgs:
        cfg.OUTPUT_DIR = ""
        cfg.MODEL.MGD = None
    assert cfgs[0] == cfgs[1]


def test_the_coco_recipe_is_the_authors():
    cfg = read_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml")
    matching = cfg.MODEL.MGD.MATCHING
    assert (matching.PERIODS, matching.MILESTONES, matching.NUM_BATCHES) == ([5000, 31000], [20000], 1000)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.BASE_LR) == (90000, (60000, 80000), 0.01)
    assert (cfg.SOLVER.NESTEROV, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.INPUT.FORMAT) == (True, 1, "RGB")
    assert cfg.MODEL.MGD.TEACHER.CONFIG_FILE == "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def test_the_finetuned_r50_is_the_model_zoos():
    theirs = detectron2.model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_3x.yaml", trained=True)
    ours = without_distillation(read_config("COCO-Detection/retinanet_R_50_FPN_mgd_R101_finetune.yaml"))
    url = ours.MODEL.WEIGHTS.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX)
    assert url == theirs.MODEL.WEIGHTS
    for key in ("PIXEL_MEAN", "PIXEL_STD", "RETINANET", "FPN"):
        assert ours.MODEL[key] == theirs.MODEL[key], key
    assert ours.MODEL.RESNETS.STRIDE_IN_1X1 is theirs.MODEL.RESNETS.STRIDE_IN_1X1 is True
    assert ours.INPUT == theirs.INPUT
    assert shapes(build_on_meta(ours)) == shapes(build_on_meta(theirs))


def test_the_recipes_differ_from_their_base_in_what_they_show():
    pkd = read_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_pkd_1x.yaml").MODEL.MGD
    assert (pkd.POSITIONS, pkd.LOSS.NAMES) == (["p3", "p4", "p5", "p6"], ["pkd"])
    assert (pkd.LOSS.PKD.WEIGHTS, pkd.INHERIT) == ([10.0], [])
    logits = read_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_logits_1x.yaml").MODEL.MGD
    assert (logits.LOGITS.WEIGHT, logits.LOSS.NAMES) == (1.0, ["partial_l2"])
    finetuned = read_config("COCO-InstanceSegmentation/mask_rcnn_MobileNetV2_FPN_mgd_R50_finetune.yaml")
    plain = read_config("COCO-InstanceSegmentation/mask_rcnn_MobileNetV2_FPN_1x.yaml")
    assert Path(finetuned.MODEL.WEIGHTS) == Path(plain.OUTPUT_DIR) / "model_final.pth"


@pytest.mark.parametrize(
    "detector, student",
    [
        *itertools.product([name for name in DETECTORS if name != "keypoint_rcnn"], ["R_18", "MobileNetV2"]),
        ("keypoint_rcnn", "MobileNetV2"),
    ],
)
def test_the_recommended_recipe_is_pkd_as_published_and_inheriting(detector, student):
    name = next(x for x in COCO if Path(x).name == f"{detector}_{student}_FPN_mgd_R50_recommended_1x.yaml")
    mgd = read_config(name).MODEL.MGD
    dense = detector in ("retinanet", "fcos")
    assert mgd.POSITIONS == (["p3", "p4", "p5", "p6"] if dense else ["p2", "p3", "p4", "p5"])
    assert (mgd.LOSS.NAMES, mgd.LOSS.PKD.WEIGHTS) == (["pkd"], [10.0 if dense else 6.0])
    assert mgd.INHERIT == (["fpn"] if detector == "fcos" else ["fpn", "head"])


@pytest.mark.parametrize("name", [name for name in COCO if parts(name)["light"] and name in DISTILLED])
def test_a_light_student_learns_by_the_recommended_recipe(name):
    mgd = read_config(name).MODEL.MGD
    dense = parts(name)["detector"] in ("retinanet", "fcos")
    assert mgd.POSITIONS == (["p3", "p4", "p5", "p6"] if dense else ["p2", "p3", "p4", "p5"])
    assert (mgd.LOSS.NAMES, mgd.LOSS.PKD.WEIGHTS) == (["pkd"], [10.0 if dense else 6.0])
    parts_of_teacher = ["fpn"] if parts(name)["detector"] == "fcos" else ["fpn", "head"]
    assert (mgd.INHERIT, mgd.MATCHING.KINDS) == (parts_of_teacher, ["auto"])


def takes_a_step(name):
    """The MobileNetV2 of every detector, one ResNet, and one of the stronger teachers, which are slow."""
    part = parts(name)
    if part["light"] or part["narrow"]:
        return "MobileNetV2" in name
    is_usual = part["teacher"] == "R50" and not part["teacher_detector"] and "MobileNetV2" in name
    one_each = name.startswith(
        ("COCO-Detection/retinanet_R_18", "COCO-InstanceSegmentation/mask_rcnn_MobileNetV2_FPN_mgd_X101")
    )
    return part["variant"] == "recommended" and (is_usual or one_each)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(filter(takes_a_step, DISTILLED)))
def test_the_recommended_recipe_takes_a_step(name, monkeypatch):
    monkeypatch.setattr("mgd_det.modeling.mgd_backbone.build_teacher", random_teacher)
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    detector = build_model(cfg).train()
    attach_losses(detector)
    distiller = find_distillation(detector).distiller
    if distiller.inheriting_positions:
        of_fpn = distiller.inheriting_positions[0]  # as a start from a trained teacher does
        distiller.set_inherited_channels(torch.arange(of_fpn.teacher_channels)[: of_fpn.student_channels])
    toy.solve_matching(detector)
    inputs = toy.batch()
    for image in inputs if cfg.MODEL.MASK_ON else ():
        box = [8.0, 10.0, 40.0, 10.0, 40.0, 44.0, 8.0, 44.0]
        image["instances"].gt_masks = PolygonMasks([[np.array(box)]])
    for image in inputs if cfg.MODEL.KEYPOINT_ON else ():
        image["instances"].gt_classes.zero_()  # persons are the only class
        image["instances"].gt_keypoints = Keypoints(torch.tensor([[[20.0, 20.0, 2.0]] * 17]))
    with EventStorage():
        losses = detector(inputs)
    assert {f"loss_pkd_{position}" for position in cfg.MODEL.MGD.POSITIONS} == {x for x in losses if "pkd" in x}
    sum(losses.values()).backward()
    gradients = [p.grad for p in detector.parameters() if p.requires_grad and p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", [name for name in WHOLE if name.endswith("_quick.yaml")])
def test_a_quick_schedule_demands_an_ap_above_zero(name):
    cfg = model_zoo.get_config(name)
    assert cfg.DATASETS.TRAIN == ("fashion_scenes_tiny_train",) and cfg.DATASETS.TEST == ("fashion_scenes_tiny_val",)
    tasks = ["bbox", "segm"] if cfg.MODEL.MASK_ON else ["bbox"]
    assert [expected[0] for expected in cfg.TEST.EXPECTED_RESULTS] == tasks
    for _, metric, value, tolerance in cfg.TEST.EXPECTED_RESULTS:
        # Detectron2 demands |AP - value| < tolerance.
        assert metric == "AP" and value - tolerance >= 1 and value + tolerance >= 100


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WHOLE if name.startswith(("FashionScenes", "quick_schedules"))])
def test_fashion_scenes_have_group_norm_everywhere(name):
    model = build_on_meta(without_distillation(model_zoo.get_config(name)))
    kinds = {type(module).__name__ for module in model.modules()}
    assert "GroupNorm" in kinds and not [kind for kind in kinds if "BatchNorm" in kind]


def test_anchor_sizes_are_those_of_detectron2s_retinanet():
    theirs = detectron2.model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    ours = read_config("COCO-Detection/retinanet_R_18_FPN_1x.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    for mine, their in zip(ours, theirs):
        assert mine == pytest.approx(their, rel=1e-4)


def test_the_keypoint_detector_has_the_heads_and_data_of_detectron2s():
    theirs = detectron2.model_zoo.get_config("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml")
    ours = read_config("COCO-Keypoints/keypoint_rcnn_MobileNetV2_FPN_1x.yaml")
    for key in ("RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_KEYPOINT_HEAD"):
        assert ours.MODEL[key] == theirs.MODEL[key], key
    assert (ours.DATASETS.TRAIN, ours.DATASETS.TEST) == (theirs.DATASETS.TRAIN, theirs.DATASETS.TEST)
    assert {key: ours.TEST[key] for key in theirs.TEST} == dict(theirs.TEST)


def test_names_and_paths_and_mistakes():
    path = model_zoo.get_config_file("demo/retinanet_R_50_FPN.yaml")
    assert model_zoo.find_config_file(path) == path == model_zoo.find_config_file("demo/retinanet_R_50_FPN.yaml")
    assert "detectron2" in model_zoo.find_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    with pytest.raises(UserError, match="no config 'demo/retinanet_R_5_FPN.yaml'. Did you mean demo/retinanet_R_50"):
        model_zoo.get_config_file("demo/retinanet_R_5_FPN.yaml")
    with pytest.raises(UserError, match="MGD.TEACHER.CONFIG_FILE 'a.py' is a LazyConfig"):
        model_zoo.find_config_file("a.py", "MODEL.MGD.TEACHER.CONFIG_FILE")
