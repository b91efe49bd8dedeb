"""Describe a training for its report, from a yaml config or a LazyConfig."""

import os
import re
import time
from typing import Any, Callable, Dict, List, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from omegaconf import DictConfig, OmegaConf

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.config import MGD_BACKBONE, class_head, merge_config
from mgd_det.data.mapper import CheckedMapper
from mgd_det.engine.evaluation import evaluation_folder
from mgd_det.engine.lazy_config import is_distilled, target_name
from mgd_det.errors import UserError
from mgd_det.modeling.teachers import teacher_config
from mgd_det.visualization.misses import Detection, NoExamples, Record, detections_of
from mgd_det.visualization.report import Run

_SECONDS = 20.0  # for the teacher on the examples' images
_RESULTS = "coco_instances_results.json"

_LOAD_YAML = """\
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from mgd_det import add_mgd_config

cfg = get_cfg()
add_mgd_config(cfg)
cfg.merge_from_file("{config}")
cfg.MODEL.WEIGHTS = "model_final.pth"
instances = DefaultPredictor(cfg)(image)["instances"]  # image: (H, W, 3) uint8 in BGR"""

_LOAD_LAZY = """\
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate

model = instantiate(LazyConfig.load("{config}").model).eval()
DetectionCheckpointer(model).load("model_final.pth")"""


def yaml_run(cfg: CfgNode) -> Run:
    """Return the description of a yaml config's training.

    Raises:
        UserError: the teacher's config cannot be read.
    """
    distilled = cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE
    report, teacher, tested = cfg.REPORT, cfg.MODEL.MGD.TEACHER, list(cfg.DATASETS.TEST)
    of_teacher = os.path.join(cfg.OUTPUT_DIR, "teacher")
    several = len(tested) > 1
    details: Dict[str, Any] = {}
    if distilled:
        details = _teacher_details(cfg, len(_classes((*tested, *cfg.DATASETS.TRAIN))), teacher.CONFIG_FILE)
    return Run(
        folder=cfg.OUTPUT_DIR,
        model=f"{cfg.MODEL.META_ARCHITECTURE}, {_backbone_name(cfg)}",
        trained_on=list(cfg.DATASETS.TRAIN),
        tested_on=tested,
        titles=_titles(cfg),
        classes=_classes((*tested, *cfg.DATASETS.TRAIN)),
        teacher_licence=report.TEACHER_LICENCE,
        teacher_scores=report.TEACHER_SCORES,
        alone=report.ALONE,
        how_to_load=_LOAD_YAML.format(config="student.yaml" if distilled else "config.yaml"),
        examples=report.EXAMPLES,
        student_detections={name: os.path.join(evaluation_folder(cfg, name), _RESULTS) for name in tested},
        teacher_detections={
            name: os.path.join(of_teacher, "inference", *([name] if several else []), _RESULTS) for name in tested
        },
        **details,
    )


def lazy_run(cfg: DictConfig) -> Run:
    """Return the description of a LazyConfig's training; train.report has the keys of REPORT in small letters.

    Raises:
        UserError: train.report has another key, or the teacher's config cannot be read.
    """
    report = lazy_report_options(cfg)
    distilled = is_distilled(cfg)
    trained, tested = (_names(cfg, split) for split in ("train", "test"))
    classes = _classes((*tested, *trained))
    backbone = cfg.model.backbone.student if distilled else cfg.model.backbone
    details: Dict[str, Any] = {}
    if distilled:
        teacher = OmegaConf.select(cfg, "model.backbone.teacher")
        if isinstance(teacher, DictConfig) and "config_file" in teacher:
            plain: Any = OmegaConf.to_container(OmegaConf.create({"opts": teacher.get("opts", [])}))
            whole = merge_config("", ["MODEL.DEVICE", cfg.train.device])
            whole.MODEL.MGD.TEACHER.CONFIG_FILE = teacher.config_file
            whole.MODEL.MGD.TEACHER.WEIGHTS = teacher.get("weights", "")
            whole.MODEL.MGD.TEACHER.OPTS = plain["opts"]
            details = _teacher_details(whole, len(classes), teacher.config_file)
        else:
            details = {"teacher": "a network of the LazyConfig", "no_teacher": "The teacher has no yaml config."}
    folder = OmegaConf.select(cfg, "dataloader.evaluator.output_dir") or ""
    return Run(
        folder=cfg.train.output_dir,
        model=f"{target_name(cfg.model)}, {target_name(backbone.get('bottom_up', backbone))}",
        trained_on=trained,
        tested_on=tested,
        classes=classes,
        teacher_licence=report["teacher_licence"],
        teacher_scores=report["teacher_scores"],
        alone=report["alone"],
        how_to_load=_LOAD_LAZY.format(config="student.yaml" if distilled else "config.yaml"),
        examples=report["examples"],
        student_detections={name: os.path.join(folder, _RESULTS) for name in tested if folder},
        **details,
    )


def _titles(cfg: CfgNode) -> Dict[str, str]:
    """Return the file names of the jsons of DATASETS.COCO_FOLDER by the names that use_coco_folders gives them."""
    folder = cfg.DATASETS.COCO_FOLDER
    paths = {"coco_folder_train": folder.TRAIN_JSON, "coco_folder_val": folder.VAL_JSON}
    return {name: os.path.basename(path) for name, path in paths.items() if path}


def lazy_report_options(cfg: DictConfig) -> Dict[str, Any]:
    """Return the report's options: the defaults of REPORT, overridden by train.report.

    Raises:
        UserError: train.report is no dict, or has a key that REPORT does not have.
    """
    options = {key.lower(): value for key, value in merge_config("", []).REPORT.items()}
    given = cfg.train.get("report", {})
    if not isinstance(given, (Mapping, DictConfig)):
        raise UserError(f"train.report is {given!r}; give a dict, such as train.report.enabled=False")
    unknown = set(given) - set(options)
    if unknown:
        raise UserError(f"train.report.{min(unknown)} is unknown: use {', '.join(options)}")
    return {**options, **given}


# ---------------------------------------------------------------------- the teacher
def _teacher_details(cfg: CfgNode, number_of_classes: int, name: str) -> Dict[str, Any]:
    """Return the fields of a Run that describe the teacher of MODEL.MGD.TEACHER."""
    teacher_cfg = teacher_config(cfg)
    details: Dict[str, Any] = {"teacher": name, "teacher_weights": teacher_cfg.MODEL.WEIGHTS}
    classes = class_head(teacher_cfg).NUM_CLASSES
    if classes != number_of_classes:
        details["no_teacher"] = (
            f"The teacher's head has {classes} classes and the data {number_of_classes}, so its detections cannot be "
            "compared with the student's."
        )
    else:
        details["run_teacher"] = _teacher_runner(teacher_cfg)
    return details


def _teacher_runner(teacher_cfg: CfgNode) -> Callable[[Sequence[Record]], Mapping[Any, List[Detection]]]:
    """Return a function that detects objects with the teacher, until its time is over."""

    def run(records: Sequence[Record]) -> Dict[Any, List[Detection]]:
        start = time.perf_counter()
        detector = build_model(teacher_cfg).eval()
        checkpointer = WeightsCheckpointer(detector)
        checkpointer.load(teacher_cfg.MODEL.WEIGHTS)
        head = [key for key in checkpointer.unset_keys if not key.startswith("backbone.")]
        if head:
            raise NoExamples(f"The teacher's weights have no head ({head[0]} is missing), so it cannot detect.")
        mapper = CheckedMapper(teacher_cfg, is_train=False)
        found: Dict[Any, List[Detection]] = {}
        with torch.no_grad():
            for record in records:
                if time.perf_counter() - start > _SECONDS:
                    break
                found[record["image_id"]] = detections_of(detector([mapper(record)])[0]["instances"])
        return found

    return run


# ---------------------------------------------------------------------- names
def _classes(names: Sequence[str]) -> List[str]:
    known = (MetadataCatalog.get(name).get("thing_classes") for name in names)
    return list(next((classes for classes in known if classes), []))


def _names(cfg: DictConfig, split: str) -> List[str]:
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
    return [names] if isinstance(names, str) else list(names or ())


def _backbone_name(cfg: CfgNode) -> str:
    """Return the name of the builder without its usual ends: "mobilenetv2 fpn"."""
    name = cfg.MODEL.BACKBONE.NAME
    name = cfg.MODEL.MGD.STUDENT_BACKBONE if name == MGD_BACKBONE else name
    short = re.sub(r"^build_(retinanet_|fcos_)?|_backbone$", "", name).replace("_", " ").replace("fpn", "FPN")
    if "timm" in short:
        return f"{cfg.MODEL.TIMM.NAME} of {short}"
    return short.replace("resnet", f"ResNet-{cfg.MODEL.RESNETS.DEPTH}")
