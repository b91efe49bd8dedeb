import json

import coco_data
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from mgd_det.data import register_coco_folder
from mgd_det.data.categories import load_categories, save_categories

NAME = "test_categories"


@pytest.fixture(autouse=True)
def forget():
    yield
    coco_data.forget(NAME)


def test_of_a_json_in_the_order_of_detectron2s_class_indices(tmp_path):
    json_file, images = coco_data.write(tmp_path, coco_data.content())
    register_coco_folder(NAME, json_file, images)
    save_categories([NAME, "another set, which is not read"], str(tmp_path))
    found = load_categories(str(tmp_path))
    DatasetCatalog.get(NAME)  # sets Detectron2's own
    indices = MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id
    assert {category["id"]: i for i, category in enumerate(found)} == indices
    assert [category["name"] for category in found] == MetadataCatalog.get(NAME).thing_classes


def test_of_a_set_without_a_json(tmp_path):
    DatasetCatalog.register(NAME, lambda: [])
    save_categories([NAME], str(tmp_path))
    assert load_categories(str(tmp_path)) is None  # its classes are not known
    MetadataCatalog.get(NAME).thing_classes = ["b", "a"]
    save_categories([NAME], str(tmp_path))
    assert json.loads((tmp_path / "categories.json").read_text()) == [{"id": 1, "name": "b"}, {"id": 2, "name": "a"}]
