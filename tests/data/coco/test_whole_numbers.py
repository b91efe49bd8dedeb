"""Numbers such as 64.0 in a json, as Detectron2 loads and evaluates them."""

import copy
import json
import os

import coco_data
import numpy as np
import pytest
import torch
from coco_data import SIZE, plain_rle
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from mgd_det.data import check_dataset, register_coco_folder
from mgd_det.data.coco.whole_numbers import with_whole_numbers

NAME = "test_whole_numbers"


@pytest.fixture(autouse=True)
def catalog():
    yield
    coco_data.forget(NAME)


def whole():
    """A set with whole numbers; each of its objects is the rectangle of its box."""
    content = coco_data.content()
    mask = np.zeros(SIZE)
    mask[10:22, 8:28] = 1
    content["annotations"][2]["segmentation"] = plain_rle(mask)
    return content


def as_floats(content):
    content = copy.deepcopy(content)
    for entry in content["images"]:
        entry.update(id=float(entry["id"]), width=float(entry["width"]), height=float(entry["height"]))
    for entry in content["annotations"]:
        entry.update(id=float(entry["id"]), iscrowd=bool(entry["iscrowd"]))
        entry.update(image_id=float(entry["image_id"]), category_id=float(entry["category_id"]))
        if isinstance(entry["segmentation"], dict):
            entry["segmentation"] = {key: [float(n) for n in entry["segmentation"][key]] for key in ("size", "counts")}
    for entry in content["categories"]:
        entry["id"] = float(entry["id"])
    return content


def by_folder(json_file, images):
    register_coco_folder(NAME, json_file, images)


def by_detectron2(json_file, images):
    register_coco_instances(NAME, {}, str(json_file), str(images))
    check_dataset(NAME)


def written(tmp_path):
    json_file, images = coco_data.write(tmp_path, whole())
    json_file.write_text(json.dumps(as_floats(whole())))
    return json_file, images


@pytest.mark.parametrize("register", [by_folder, by_detectron2])
def test_loaded_as_whole_numbers(tmp_path, register):
    coco_data.write(tmp_path / "whole", whole())
    register_coco_instances(NAME + "_whole", {}, str(tmp_path / "whole" / "instances.json"), str(tmp_path / "images"))
    json_file, images = written(tmp_path)
    before = json_file.read_bytes()
    register(json_file, images)
    assert repr(DatasetCatalog.get(NAME)) == repr(DatasetCatalog.get(NAME + "_whole"))  # 64 and 64.0 differ
    metadata = MetadataCatalog.get(NAME)
    assert repr(metadata.thing_dataset_id_to_contiguous_id) == "{7: 0, 20: 1, 91: 2}"
    assert json.loads(open(metadata.json_file).read()) == whole() and os.fspath(metadata.original_json_file) == str(
        json_file
    )
    assert json_file.read_bytes() == before
    for again in (check_dataset, lambda name: register_coco_folder(name, json_file, images)):
        again(NAME)
        assert MetadataCatalog.get(NAME) is metadata and metadata.json_file != str(json_file)


@pytest.mark.parametrize("register", [by_folder, by_detectron2])
def test_masks_are_evaluated(tmp_path, register):
    register(*written(tmp_path))
    truth = COCO(MetadataCatalog.get(NAME).json_file)
    evaluator = COCOEvaluator(NAME, distributed=False)
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        found = record["annotations"]
        instances = Instances((record["height"], record["width"]), scores=torch.ones(len(found)))
        instances.pred_boxes = Boxes(torch.tensor([[8.0, 10, 28, 22]] * len(found)).reshape(-1, 4))
        instances.pred_classes = torch.tensor([entry["category_id"] for entry in found], dtype=torch.int64)
        masks = [truth.annToMask(entry) for entry in truth.loadAnns(truth.getAnnIds(imgIds=[record["image_id"]]))]
        assert [mask.sum() for mask in masks] == [240] * len(found)
        instances.pred_masks = torch.tensor(np.array(masks)).reshape(-1, *SIZE)
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100) and results["segm"]["AP"] == pytest.approx(100)


def test_a_file_that_changes_is_read_again(tmp_path):
    json_file, images = written(tmp_path)
    by_detectron2(json_file, images)
    content = whole()
    content["images"][0]["height"], content["annotations"][0]["bbox"] = 48, [8, 10, 20, 11]
    json_file.write_text(json.dumps(content))
    check_dataset(NAME)
    assert MetadataCatalog.get(NAME).json_file == str(json_file)
    assert DatasetCatalog.get(NAME)[0]["annotations"][0]["bbox"] == [8, 10, 20, 11]


def test_a_loader_of_the_users_own_stays(tmp_path):
    json_file, images = written(tmp_path)
    DatasetCatalog.register(NAME, lambda: ["own"])
    MetadataCatalog.get(NAME).set(json_file=str(json_file), image_root=str(images), evaluator_type="coco")
    check_dataset(NAME)
    assert DatasetCatalog.get(NAME) == ["own"]
    assert json.loads(open(MetadataCatalog.get(NAME).json_file).read()) == whole()


def test_a_set_with_whole_numbers_is_read_as_it_is(tmp_path):
    json_file, images = coco_data.write(tmp_path, whole())
    by_folder(json_file, images)
    assert MetadataCatalog.get(NAME).json_file == str(json_file)


@pytest.mark.parametrize("value", [None, [], {}, {"images": 3}, {"images": [3, None, {"id": []}, {"width": 1.5}]}])
def test_what_cannot_be_converted_stays(value):
    assert with_whole_numbers(value) is value


def test_only_whole_numbers_are_converted():
    before = {"id": 2.5, "image_id": True, "category_id": "7", "iscrowd": 0.5, "bbox": [8.0], "area": 240.0}
    before["segmentation"] = {"size": [48.0, 64], "counts": [True, 0.5, None]}
    content = {"annotations": [before]}
    after = with_whole_numbers(content)["annotations"][0]
    assert repr(after) == repr({**before, "segmentation": {"size": [48, 64], "counts": [1, 0.5, None]}})
    assert before["segmentation"]["size"] == [48.0, 64] and type(before["segmentation"]["size"][0]) is float
