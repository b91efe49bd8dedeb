"""The config of a distillation by the recommended recipe (docs/inheriting.md), for any teacher with an FPN."""

import os
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence

import yaml
from detectron2.config import CfgNode

from mgd_det.config import MGD_BACKBONE, detector_kind
from mgd_det.data.coco.clean import original_name
from mgd_det.errors import UserError
from mgd_det.model_zoo import get_config_file
from mgd_det.recipe.light import light_settings
from mgd_det.recipe.settings import Settings
from mgd_det.recipe.students import Student
from mgd_det.recipe.teacher_files import TrainedDetector, absolute

# Of each kind: the base config, and the part of the recipes' names.
_BASES = {
    "RetinaNet": ("Base-RetinaNet.yaml", "Dense"),
    "FCOS": ("Base-FCOS.yaml", "Dense"),
    "GeneralizedRCNN": ("Base-RCNN-FPN.yaml", "RCNN"),
}
_ROI_HEADS = ("StandardROIHeads", "CascadeROIHeads")
# What makes a detector, except its backbone. The student has the teacher's, so that it can inherit the weights.
_DETECTOR = {
    "RetinaNet": ("ANCHOR_GENERATOR", "RETINANET"),
    "FCOS": ("FCOS",),
    "GeneralizedRCNN": ("PROPOSAL_GENERATOR", "ANCHOR_GENERATOR", "RPN", "ROI_HEADS", "ROI_BOX_HEAD"),
}
_TASKS = {"MASK_ON": "ROI_MASK_HEAD", "KEYPOINT_ON": "ROI_KEYPOINT_HEAD"}


@dataclass(frozen=True)
class RunData:
    """The data sets of a run. Without any, they are those of the teacher.

    Attributes:
        coco_folder: keys of DATASETS.COCO_FOLDER and paths.
        train: names of registered data sets, for DATASETS.TRAIN.
        val: for DATASETS.TEST.
    """

    coco_folder: Dict[str, str]
    train: Sequence[str] = ()
    val: Sequence[str] = ()


def recommended_config(
    teacher: TrainedDetector,
    student: Student,
    data: RunData,
    *,
    light: bool = False,
    iterations: Optional[int] = None,
    batch: Optional[int] = None,
    teacher_opts: Sequence[Any] = (),
    output_dir: str = "",
) -> Settings:
    """Make the config of a student that learns from a teacher of the same kind by the recommended recipe.

    Args:
        teacher: a RetinaNet, an FCOS, or a Faster, Mask, Cascade or Keypoint R-CNN, with an FPN.
        student: the network.
        data: the data sets.
        light: give the student the light preset (docs/light.md): an FPN and heads that are lighter than the teacher's.
        iterations: of the training; the milestones of the learning rate are scaled to it. None: as many images as the
            base config sees.
        batch: images in a batch; the learning rate is scaled to it by the linear rule. None: the base config's.
        teacher_opts: MODEL.MGD.TEACHER.OPTS, with which ``teacher`` was found.
        output_dir: OUTPUT_DIR; "" for the base config's.

    Raises:
        UserError: the teacher is of another kind, or has no FPN.
    """
    base, recipe = _bases(teacher)
    settings = Settings(base)
    _set_student(settings, student, teacher.cfg, light)
    _set_detector(settings, teacher.cfg, light)
    for kind in ["Recommended"] + ["Light"] * light:
        _set_recipe(settings, f"Base-MGD-{kind}-{recipe}.yaml")
    settings.set("MODEL.MGD.TEACHER.CONFIG_FILE", teacher.config_file, "--teacher")
    settings.set("MODEL.MGD.TEACHER.WEIGHTS", teacher.weights, "the teacher's weights")
    settings.set("MODEL.MGD.TEACHER.OPTS", list(teacher_opts), "your override")
    _set_data(settings, data, teacher.cfg)
    _set_schedule(settings, iterations, batch)
    settings.set("SEED", 1, "so that this config repeats the run")
    if output_dir:
        settings.set("OUTPUT_DIR", output_dir, "--output-dir")
    return settings


def kind_of(cfg: CfgNode) -> str:
    """Return what people call the detector of a config: "RetinaNet", "Mask R-CNN"..."""
    if detector_kind(cfg) != "GeneralizedRCNN":
        return detector_kind(cfg)
    cascade = "Cascade " if cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads" else ""
    task = "Mask" if cfg.MODEL.MASK_ON else "Keypoint" if cfg.MODEL.KEYPOINT_ON else "" if cascade else "Faster"
    return f"{cascade}{task} R-CNN".replace("  ", " ")


def _bases(teacher: TrainedDetector) -> Sequence[str]:
    """Return the name of the student's base config, and the part of the recipes' names."""
    model, name = teacher.cfg.MODEL, teacher.config_file
    supported = "RetinaNet, FCOS, or Faster, Mask, Cascade or Keypoint R-CNN"
    advice = f"give a {supported} with an FPN; for others, write a config for tools/train_net.py (docs/method.md)"
    if detector_kind(teacher.cfg) not in _BASES:
        raise UserError(f"--teacher {name} has MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE!r}: {advice}")
    if "fpn" not in model.BACKBONE.NAME.lower():
        raise UserError(
            f"--teacher {name} has MODEL.BACKBONE.NAME {model.BACKBONE.NAME!r}, and the recipe distils the levels of "
            f"an FPN: {advice}"
        )
    if model.META_ARCHITECTURE == "GeneralizedRCNN" and model.ROI_HEADS.NAME not in _ROI_HEADS:
        raise UserError(f"--teacher {name} has MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME!r}: {advice}")
    if model.LOAD_PROPOSALS:
        raise UserError(f"--teacher {name} has MODEL.LOAD_PROPOSALS True, so it finds no objects by itself: {advice}")
    return _BASES[detector_kind(teacher.cfg)]


def _set_student(settings: Settings, student: Student, teacher_cfg: CfgNode, light: bool) -> None:
    why = f"--student {student.name}"
    settings.set("MODEL.BACKBONE.NAME", MGD_BACKBONE, "the student's backbone, with distillation")
    settings.set("MODEL.MGD.STUDENT_BACKBONE", _builder(student, teacher_cfg, light), why)
    for key, value in student.keys.items():
        settings.set(key, value, why)
    settings.set("MODEL.WEIGHTS", student.weights, "its ImageNet weights")
    settings.set("MODEL.PIXEL_MEAN", student.pixel_mean, "what these weights were trained with")
    settings.set("MODEL.PIXEL_STD", student.pixel_std, "what these weights were trained with")


def _builder(student: Student, teacher_cfg: CfgNode, light: bool) -> str:
    """Return the builder whose levels above p5 are made as the teacher's; its FPN is separable if the teacher's is."""
    kinds = {"RetinaNet": "retinanet_", "FCOS": "fcos_"}
    name = teacher_cfg.MODEL.BACKBONE.NAME
    prefix = kinds.get(detector_kind(teacher_cfg), "")
    if prefix and name.startswith(("build_retinanet_", "build_fcos_")):
        prefix = "fcos_" if name.startswith("build_fcos_") else "retinanet_"
    fpn = "separable_fpn" if light or "_separable_fpn_" in name else "fpn"
    return f"build_{prefix}{student.network}_{fpn}_backbone"


def _set_detector(settings: Settings, teacher_cfg: CfgNode, light: bool) -> None:
    why = "as the teacher's" if light else "as the teacher's, so that the student can inherit"
    model = teacher_cfg.MODEL
    nodes = ["META_ARCHITECTURE", "FPN", *_DETECTOR[detector_kind(teacher_cfg)]]
    if model.META_ARCHITECTURE == "GeneralizedRCNN":
        nodes += ["ROI_BOX_CASCADE_HEAD"] * (model.ROI_HEADS.NAME == "CascadeROIHeads")
        nodes += [*_TASKS, *(head for key, head in _TASKS.items() if model[key])]
    for node in nodes:
        settings.set(f"MODEL.{node}", model[node], why)
    if light:
        for key, value in light_settings(teacher_cfg).items():
            settings.set(key, value, "--light (docs/light.md)")
    for key, value in teacher_cfg.INPUT.items():
        if key != "FORMAT":
            settings.set(f"INPUT.{key}", value, "the images as the teacher knows them")
    for key in ("DETECTIONS_PER_IMAGE", "KEYPOINT_OKS_SIGMAS"):
        settings.set(f"TEST.{key}", teacher_cfg.TEST[key], "as the teacher's")


def _set_recipe(settings: Settings, name: str) -> None:
    # Only the lines of the file: what they do not name stays the base config's.
    with open(get_config_file(name), encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    settings.set("MODEL", recipe["MODEL"], f"the recommended recipe ({name})")


def _set_data(settings: Settings, data: RunData, teacher_cfg: CfgNode) -> None:
    has_own = any(data.coco_folder.values()) or data.train or data.val
    if not has_own:
        for key in ("TRAIN", "TEST", "COCO_FOLDER", "BROKEN_INPUT", "KEYPOINT_NAMES", "KEYPOINT_FLIP_PAIRS"):
            value = teacher_cfg.DATASETS[key]
            if key in ("TRAIN", "TEST"):  # a teacher that skipped broken input trained on a set of its own
                value = tuple(map(original_name, value))
            if key == "COCO_FOLDER":
                value = {name: absolute(path) for name, path in value.items()}
            settings.set(f"DATASETS.{key}", value, "the teacher's data, since you named none")
        return
    for split, key, names in (("TRAIN", "TRAIN", data.train), ("VAL", "TEST", data.val)):
        paths = {name: path for name, path in data.coco_folder.items() if name.startswith(split) and path}
        for name, path in paths.items():
            settings.set(f"DATASETS.COCO_FOLDER.{name}", absolute(path), f"--{name.lower().replace('_', '-')}")
        if names and paths:
            raise UserError(f"--{split.lower()}-dataset and --{split.lower()}-json are given: give one of them")
        if names:
            settings.set(f"DATASETS.{key}", tuple(names), f"--{split.lower()}-dataset")
        elif not paths:
            settings.set(f"DATASETS.{key}", (), f"no --{split.lower()}-json and no --{split.lower()}-dataset")


def _set_schedule(settings: Settings, iterations: Optional[int], batch: Optional[int]) -> None:
    solver = settings.cfg.SOLVER
    reference, base_iterations, base_lr = solver.IMS_PER_BATCH, solver.MAX_ITER, solver.BASE_LR
    batch = batch or reference
    if batch != reference:
        settings.set("SOLVER.IMS_PER_BATCH", batch, "--batch")
        why = f"{base_lr:g} for {reference} images a batch; by the linear rule x {batch}/{reference}"
        settings.set("SOLVER.BASE_LR", base_lr * batch / reference, why)
    why = "--iterations"
    if iterations is None:
        iterations, why = max(round(base_iterations * reference / batch), 1), "as many images as the base config sees"
    if iterations == base_iterations:
        return
    settings.set("SOLVER.MAX_ITER", iterations, why)
    steps = [round(step * iterations / base_iterations) for step in solver.STEPS]
    steps = sorted({step for step in steps if 0 < step < iterations})
    settings.set("SOLVER.STEPS", tuple(steps), f"scaled with the iterations, from {solver.STEPS}")
    warmup = min(solver.WARMUP_ITERS, iterations // 10)
    settings.set("SOLVER.WARMUP_ITERS", warmup, "at most a tenth of the iterations")
    period = min(solver.CHECKPOINT_PERIOD, max(iterations // 4, 1))
    settings.set("SOLVER.CHECKPOINT_PERIOD", period, "at least four checkpoints, for --resume")


def alone(cfg: CfgNode) -> CfgNode:
    """Return a copy of a recommended config that trains the student alone, in a folder "alone" of OUTPUT_DIR."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.MGD.STUDENT_BACKBONE
    cfg.MODEL.MGD.INHERIT = []
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "alone")
    return cfg
