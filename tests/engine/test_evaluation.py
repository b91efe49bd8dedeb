"""The keys of TEST and the data sets' evaluators: read as Detectron2's own program reads them, or refused."""

import json
import logging

import pytest
import torch
import toy
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from mgd_det.config import plain_student_config
from mgd_det.data import register_coco_folder
from mgd_det.engine import Trainer, evaluation, load_and_test
from mgd_det.engine.evaluation import build_evaluator, check_evaluation, evaluation_folder
from mgd_det.errors import UserError

NAME = "test_evaluation"


@pytest.fixture
def name():
    yield NAME
    for name in (NAME, f"{NAME}_2"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def register(tmp_path, annotations):
    """Registers a set of one image of 1000 x 1000 with objects of one class."""
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "iscrowd": 0, **annotation}
        for i, annotation in enumerate(annotations, 1)
    ]
    images = [{"id": 1, "file_name": "1.png", "width": 1000, "height": 1000}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(tmp_path / "set.json"), str(tmp_path))
    DatasetCatalog.get(NAME)  # which fills the metadata


def average_precision(evaluator, task, **fields):
    evaluator.reset()
    instances = Instances((1000, 1000), **fields)
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    return evaluator.evaluate()[task]["AP"]


@pytest.mark.parametrize("limit, expected", [(150, 100), (100, 100 * 67 / 101)])
def test_ap_counts_the_detections_that_the_config_keeps(name, tmp_path, limit, expected):
    """All 150 objects are found; at 100 detections a recall of 2/3, 67 of COCO's 101 recalls."""
    corners = [(60 * (i % 15), 60 * (i // 15)) for i in range(150)]
    register(tmp_path, [{"bbox": [x, y, 40, 40], "area": 1600} for x, y in corners])
    cfg = toy.plain_config(opts=["TEST.DETECTIONS_PER_IMAGE", limit])
    found = average_precision(
        build_evaluator(cfg, name, str(tmp_path)),
        "bbox",
        pred_boxes=Boxes(torch.tensor([[x, y, x + 40, y + 40] for x, y in corners], dtype=torch.float)),
        scores=torch.linspace(0.9, 0.5, 150),
        pred_classes=torch.zeros(150, dtype=torch.int64),
    )
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("sigma, expected", [(0.1, 30), (0.05, 0)])
def test_keypoints_are_scored_by_the_configs_sigmas(name, tmp_path, sigma, expected):
    """Both keypoints are 4 pixels off: OKS exp(-4^2 / (2 * area * (2 sigma)^2)) is 0.61, or 0.14."""
    points = [[100.0, 100.0], [110.0, 110.0]]
    keypoints = [value for x, y in points for value in (x, y, 2)]
    register(tmp_path, [{"bbox": [95, 95, 20, 20], "area": 400, "keypoints": keypoints, "num_keypoints": len(points)}])
    cfg = toy.plain_config(toy.RCNN, opts=["TEST.KEYPOINT_OKS_SIGMAS", f"[{sigma}, {sigma}]"])
    # Detectron2 writes predictions to the middle of COCO's pixels, half a pixel less.
    found = torch.tensor([[[x + 0.5 + 4, y + 0.5, 1] for x, y in points]])
    score = average_precision(
        build_evaluator(cfg, name, str(tmp_path)),
        "keypoints",
        pred_boxes=Boxes(torch.tensor([[95.0, 95, 115, 115]])),
        scores=torch.tensor([0.9]),
        pred_classes=torch.tensor([0]),
        pred_keypoints=found,
    )
    assert score == pytest.approx(expected)


def test_a_set_of_pascal_voc_has_its_own_evaluator(name, tmp_path):
    register_pascal_voc(name, str(tmp_path), "val", 2007, ["thing"])
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"  # as Detectron2's builtin.py sets it
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("one\n")
    box = "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>80</ymax></bndbox>"
    thing = f"<object><name>thing</name><pose/><truncated>0</truncated><difficult>0</difficult>{box}</object>"
    (tmp_path / "Annotations" / "one.xml").write_text(f"<annotation>{thing}</annotation>")
    evaluator = build_evaluator(toy.plain_config(), name, str(tmp_path))
    assert isinstance(evaluator, PascalVOCDetectionEvaluator)
    evaluator.reset()
    # Two of 40 columns are missed: an IoU of 0.95, not over the last of the ten thresholds.
    found = Instances((100, 100), pred_boxes=Boxes(torch.tensor([[10.0, 20, 48, 80]])), scores=torch.tensor([0.9]))
    found.pred_classes = torch.tensor([0])
    evaluator.process([{"image_id": "one"}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"] == {
        "AP": pytest.approx(90),
        "AP50": pytest.approx(100),
        "AP75": pytest.approx(100),
    }


@pytest.mark.parametrize("fast", [True, False])
def test_the_fast_evaluation_has_a_key(name, tmp_path, fast):
    pytest.importorskip("hotcoco")
    register(tmp_path, [{"bbox": [95, 95, 20, 20], "area": 400}])
    cfg = toy.plain_config(opts=["TEST.FAST_EVAL", fast])
    assert build_evaluator(cfg, name, str(tmp_path))._use_hotcoco is fast
    assert "FAST_EVAL" not in plain_student_config(cfg).TEST


def test_lvis_keeps_its_300_detections_or_the_configs(name, tmp_path, monkeypatch):
    MetadataCatalog.get(name).evaluator_type = "lvis"
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(evaluation, "LVISEvaluator", lambda *args, **options: (args, options))
    for kept, limit in ((100, 300), (400, 400)):
        cfg = toy.plain_config(opts=["TEST.DETECTIONS_PER_IMAGE", kept])
        made = build_evaluator(cfg, name, "folder")
        assert made == ((name,), {"output_dir": "folder", "max_dets_per_image": limit})


def test_a_detector_on_a_panoptic_set_is_scored_by_its_objects(name, tmp_path):
    register(tmp_path, [{"bbox": [95, 95, 20, 20], "area": 400}])
    del MetadataCatalog.get(name).__dict__["evaluator_type"]
    MetadataCatalog.get(name).evaluator_type = "coco_panoptic_seg"
    evaluator = build_evaluator(toy.plain_config(), name, str(tmp_path))
    assert isinstance(evaluator, COCOEvaluator)


@pytest.mark.parametrize(
    "kind, base, opts, said",
    [
        ("lvis", toy.RETINANET, [], "lvis"),
        ("cityscapes_instance", toy.RCNN, [], "cityscapesscripts"),
        ("cityscapes_instance", toy.RCNN, ["MODEL.MASK_ON", "False"], "MODEL.MASK_ON False"),
        ("sem_seg", toy.RETINANET, [], "RetinaNet"),
        ("cityscapes_panoptic_seg", toy.RCNN, [], "'cityscapes_panoptic_seg'"),
        ("coco_panoptic_seg", toy.RCNN, ["MODEL.META_ARCHITECTURE", "PanopticFPN"], "panopticapi"),
    ],
)
def test_sets_that_cannot_be_scored(name, monkeypatch, kind, base, opts, said):
    MetadataCatalog.get(name).evaluator_type = kind
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda package: None)
    cfg = toy.plain_config(base, opts=["DATASETS.TEST", f"('{name}',)", *opts])
    with pytest.raises(UserError, match=f"DATASETS.TEST {name}.*{said}"):
        check_evaluation(cfg)
    with pytest.raises(UserError, match=said):
        Trainer(cfg)
    with pytest.raises(UserError, match=said):
        load_and_test(cfg)


@pytest.mark.parametrize(
    "base, opts, said",
    [
        (toy.RETINANET, ["TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED .*RetinaNet"),
        (toy.RCNN, ["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "PanopticFPN"], "PanopticFPN"),
        (toy.RCNN, ["TEST.AUG.ENABLED", "True", "MODEL.KEYPOINT_ON", "True"], "TEST.AUG.ENABLED .*MODEL.KEYPOINT_ON"),
        (toy.RCNN, ["TEST.AUG.ENABLED", "True", "MODEL.LOAD_PROPOSALS", "True"], "MODEL.LOAD_PROPOSALS"),
        (toy.RCNN, ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1]"], "TEST.KEYPOINT_OKS_SIGMAS .*MODEL.KEYPOINT_ON"),
        (
            toy.RCNN,
            ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1]", "MODEL.KEYPOINT_ON", "True"],
            "TEST.KEYPOINT_OKS_SIGMAS has 1 .*NUM_KEYPOINTS is 17",
        ),
    ],
)
def test_keys_that_the_detector_cannot_follow(base, opts, said):
    cfg = toy.plain_config(base, opts=["DATASETS.TEST", "()"])
    check_evaluation(cfg)
    cfg.merge_from_list(opts)
    with pytest.raises(UserError, match=said):
        check_evaluation(cfg)


def test_one_set_keeps_its_folder_and_several_have_one_each():
    cfg = toy.plain_config(opts=["OUTPUT_DIR", "out", "DATASETS.TEST", "('a',)"])
    assert evaluation_folder(cfg, "a") == "out/inference"
    cfg.DATASETS.TEST = ("a", "b")
    assert [evaluation_folder(cfg, name, "inference_TTA") for name in "ab"] == [
        "out/inference_TTA/a",
        "out/inference_TTA/b",
    ]


@pytest.mark.slow
def test_two_sets_with_augmentation_and_random_weights(name, tmp_path, caplog):
    *_, val_json, _, val_images = toy.write_scenes(tmp_path / "toy", train=1, val=2)
    names = (name, f"{name}_2")
    for registered in names:
        register_coco_folder(registered, val_json, val_images)
    cfg = toy.plain_config(toy.RCNN, opts=["DATASETS.TEST", str(names), "MODEL.MASK_ON", "False"])
    cfg.OUTPUT_DIR, cfg.DATALOADER.NUM_WORKERS, cfg.MODEL.ROI_HEADS.NUM_CLASSES = str(tmp_path / "out"), 0, 4
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = True, (64, 96), 0.0
    with caplog.at_level(logging.WARNING, "mgd_det"):
        results = load_and_test(cfg)
    assert "MODEL.WEIGHTS" in caplog.text and "RANDOM WEIGHTS" in caplog.text
    assert set(results) == {*names, f"{names[0]}_TTA", f"{names[1]}_TTA"}
    plain, augmented = ([tmp_path / "out" / kind / n for n in names] for kind in ("inference", "inference_TTA"))
    predictions = [(folder / "coco_instances_results.json").read_text() for folder in plain + augmented]
    assert predictions[0] == predictions[1] != predictions[2] == predictions[3]

    caplog.clear()
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.TEST.AUG.ENABLED, cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST = False, str(tmp_path / "model.pth"), names[:1]
    with caplog.at_level(logging.WARNING, "mgd_det"):
        assert "bbox" in load_and_test(cfg)
    assert "RANDOM WEIGHTS" not in caplog.text


@pytest.mark.slow
def test_augmentation_runs_at_the_end_of_a_training_only(name, tmp_path, monkeypatch):
    _, train_json, _, train_images, *_ = toy.write_scenes(tmp_path / "toy", train=2, val=1)
    register_coco_folder(name, train_json, train_images)
    cfg = toy.plain_config(toy.RCNN, opts=["DATASETS.TRAIN", f"('{name}',)", "MODEL.MASK_ON", "False"])
    cfg.merge_from_list(["DATASETS.TEST", f"('{name}',)", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"])
    cfg.OUTPUT_DIR, cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = str(tmp_path / "out"), 0, 1
    cfg.TEST.AUG.ENABLED, cfg.TEST.EVAL_PERIOD = True, 1
    scored = []

    def test(cls, cfg, model, evaluators=None):
        scored.append((type(model).__name__, evaluators and evaluators[0]._output_dir))
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    trainer = Trainer(cfg)
    results = trainer.train() or trainer._last_eval_results
    plain = (type(trainer.model).__name__, None)
    assert scored == [plain, plain, ("GeneralizedRCNNWithTTA", str(tmp_path / "out" / "inference_TTA"))]
    assert results == {"bbox": {"AP": 1.0}, "bbox_TTA": {"AP": 1.0}}
    assert trainer.storage.latest()["bbox_TTA/AP"][0] == 1.0
