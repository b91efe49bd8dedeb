"""What the report is told of a training, from yaml and from a LazyConfig."""

import coco_data
import pytest
import torch
import toy
from detectron2.config import LazyCall
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import RetinaNet
from omegaconf import OmegaConf

from mgd_det.data import register_coco_folder
from mgd_det.engine.run_report import lazy_report_options, lazy_run, yaml_run
from mgd_det.errors import UserError
from mgd_det.visualization.misses import NoExamples

NAME = "test_run_report"


@pytest.fixture
def cfg(tmp_path):
    """A distillation's config on a set of three classes, with a teacher of three."""
    register_coco_folder(NAME, *coco_data.write(tmp_path / "data", coco_data.content()))
    torch.manual_seed(0)
    three = ["MODEL.RETINANET.NUM_CLASSES", "3", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    teacher = build_model(toy.teacher_config(opts=three))
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    opts = ["OUTPUT_DIR", "out", "DATASETS.TRAIN", "('a_train',)", "DATASETS.TEST", f"('{NAME}',)", *three]
    opts += ["REPORT.TEACHER_LICENCE", "MIT", "REPORT.ALONE", "alone", "REPORT.EXAMPLES", "2"]
    opts += ["MODEL.MGD.TEACHER.OPTS", str([*toy.teacher_opts(), *three])]
    yield toy.distilled_config(str(tmp_path / "teacher.pth"), opts=opts)
    coco_data.forget(NAME)


def test_a_distillation_from_yaml(cfg):
    run = yaml_run(cfg)
    assert (run.folder, run.model, run.trained_on, run.tested_on) == (
        "out",
        "RetinaNet, ResNet-18 FPN",
        ["a_train"],
        [NAME],
    )
    assert list(run.classes) == ["plane", "car", "ship"]
    assert (run.teacher, run.teacher_licence, run.alone, run.examples) == (toy.RETINANET, "MIT", "alone", 2)
    assert run.teacher_weights.endswith("teacher.pth") and "student.yaml" in run.how_to_load
    results = "coco_instances_results.json"
    assert run.student_detections == {NAME: f"out/inference/{results}"}
    assert run.teacher_detections == {NAME: f"out/teacher/inference/{results}"}
    cfg.DATASETS.TEST = (NAME, "another")
    assert yaml_run(cfg).teacher_detections[NAME] == f"out/teacher/inference/{NAME}/{results}"


def test_a_set_of_coco_folder_is_called_by_its_file(cfg):
    assert yaml_run(cfg).titles == {}
    cfg.DATASETS.COCO_FOLDER.VAL_JSON = "some/where/boats.json"
    assert yaml_run(cfg).titles == {"coco_folder_val": "boats.json"}


@pytest.mark.slow
def test_the_teacher_detects_on_the_images_that_it_is_given(cfg):
    records = DatasetCatalog.get(NAME)[:2]
    found = yaml_run(cfg).run_teacher(records)
    assert list(found) == [record["image_id"] for record in records]
    for detections in found.values():
        assert detections and {d["category_id"] for d in detections} <= {0, 1, 2}
        boxes = torch.tensor([d["bbox"] for d in detections])
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 0] + boxes[:, 2] <= 64.01).all()


@pytest.mark.slow
def test_a_teacher_that_cannot_be_compared(cfg, tmp_path):
    weights = torch.load(tmp_path / "teacher.pth")["model"]
    torch.save({"model": {k: v for k, v in weights.items() if k.startswith("backbone.")}}, tmp_path / "teacher.pth")
    with pytest.raises(NoExamples, match="head"):
        yaml_run(cfg).run_teacher(DatasetCatalog.get(NAME)[:1])
    MetadataCatalog.get(NAME).__dict__.pop("thing_classes")
    MetadataCatalog.get(NAME).thing_classes = ["one", "two"]
    run = yaml_run(cfg)
    assert run.run_teacher is None and "3 classes" in run.no_teacher and "2" in run.no_teacher


def test_a_plain_training_from_yaml():
    run = yaml_run(toy.plain_config(opts=["DATASETS.TEST", "()"]))
    assert run.teacher == "" and run.run_teacher is None and "config.yaml" in run.how_to_load


def lazy_config(**report):
    model = LazyCall(RetinaNet)(backbone={"bottom_up": LazyCall(torch.nn.Identity)()})
    dataloader = {split: {"dataset": {"names": name}} for split, name in (("train", "a_train"), ("test", NAME))}
    train = {"output_dir": "out", "device": "cpu", "report": report}
    return OmegaConf.create({"model": model, "dataloader": dataloader, "train": train}, flags={"allow_objects": True})


def test_a_training_from_a_lazyconfig():
    run = lazy_run(lazy_config(alone="alone", teacher_licence="MIT"))
    assert (run.folder, run.model, run.trained_on, run.tested_on) == ("out", "RetinaNet, Identity", ["a_train"], [NAME])
    assert (run.alone, run.teacher_licence, run.examples, run.teacher) == ("alone", "MIT", 4, "")
    cfg = lazy_config()
    cfg.model.backbone = {"student": cfg.model.backbone, "teacher": {"config_file": toy.RETINANET, "weights": "t.pth"}}
    run = lazy_run(cfg)
    assert (run.model, run.teacher, run.teacher_weights) == ("RetinaNet, Identity", toy.RETINANET, "t.pth")
    assert "student.yaml" in run.how_to_load


def test_a_key_of_a_lazyconfig_that_is_not_there():
    with pytest.raises(UserError, match="train.report.no_such .*teacher_licence"):
        lazy_report_options(lazy_config(no_such=1))
    assert lazy_report_options(lazy_config(enabled=False))["enabled"] is False


@pytest.mark.parametrize("value", [True, None, "off"])
def test_an_entry_of_a_lazyconfig_that_is_no_dict(value):
    cfg = lazy_config()
    cfg.train.report = value
    with pytest.raises(UserError, match=f"train.report is {value!r}"):
        lazy_report_options(cfg)
