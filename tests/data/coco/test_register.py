import json
import os
import re
import subprocess
import sys

import coco_data
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mgd_det.data import CLASS_NAMES, DATASETS_ROOT, check_dataset, dataset_classes, register_coco_folder
from mgd_det.data.coco import register
from mgd_det.data.fashion_scenes.photos import FashionPhotos
from mgd_det.data.fashion_scenes.scenes import SceneSpec, write_fashion_scenes
from mgd_det.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    """A small set on disk; its parts, and a function that writes its json after they were changed."""

    class Dataset:
        json_file = tmp_path / "instances.json"
        image_root = tmp_path / "images"
        content = coco_data.content()

        def write(self, text=None):
            self.json_file.write_text(json.dumps(self.content) if text is None else text)
            return self.json_file, self.image_root

    Dataset.content["images"][2]["file_name"] = "deep/er/3.png"
    Dataset.content["annotations"][0]["category_id"] = 91
    coco_data.write(tmp_path, Dataset.content)
    return Dataset()


@pytest.fixture
def name():
    yield "test_coco_folder"
    coco_data.forget("test_coco_folder")


def error_of(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    return str(error.value)


def test_registers_with_classes_in_detectron2s_order(name, dataset):
    assert register_coco_folder(name, *dataset.write()) == ["plane", "car", "ship"]
    assert dataset_classes(name) == ["plane", "car", "ship"]
    check_dataset(name, ["area", "iscrowd", "segmentation", "polygons"])
    records = DatasetCatalog.get(name)
    assert len(records) == 6
    classes = MetadataCatalog.get(name).thing_classes
    assert [classes[a["category_id"]] for r in records for a in r["annotations"]] == [
        coco_data.CATEGORIES[a["category_id"]] for a in dataset.content["annotations"]
    ]


def test_reads_what_the_scene_tool_writes(name, tmp_path):
    photos = FashionPhotos(np.full((2, 28, 28), 200, np.uint8), np.array([0, 9]))
    root = write_fashion_scenes(tmp_path / "set", SceneSpec("set", 3, 2, 64), photos, photos, workers=1)
    paths = root / "annotations" / "instances_train.json", root / "images" / "train"
    assert register_coco_folder(name, *paths) == CLASS_NAMES
    records = DatasetCatalog.get(name)
    assert len(records) == 3 and all(os.path.isfile(record["file_name"]) for record in records)


def test_the_same_again_changes_nothing(name, dataset, monkeypatch):
    register_coco_folder(name, *dataset.write())
    loader = DatasetCatalog[name]
    monkeypatch.chdir(dataset.image_root)
    assert register_coco_folder(name, "../instances.json", ".") == ["plane", "car", "ship"]
    assert DatasetCatalog[name] is loader


def test_a_taken_name(name, dataset):
    register_coco_folder(name, *dataset.write())
    message = error_of(register_coco_folder, name, dataset.json_file, dataset.image_root / "deep")
    assert name in message and "taken" in message and "another name" in message


def test_absent_json(name, dataset):
    dataset.json_file.unlink()
    message = error_of(register_coco_folder, name, dataset.json_file, dataset.image_root)
    assert str(dataset.json_file) in message and "no file" in message
    assert name not in DatasetCatalog


def test_absent_image_folder(name, dataset):
    json_file, _ = dataset.write()
    assert "no image folder" in error_of(register_coco_folder, name, json_file, dataset.image_root / "x")


def test_what_cannot_be_used_at_all_is_refused_in_both_ways(name, dataset):
    for text, said in (('{"images": [', "as json"), ("[]", "COCO's instances format"), ("", "as json")):
        for broken_input in ("refuse", "skip"):
            with pytest.raises(UserError) as error:
                register_coco_folder(name, *dataset.write(text), broken_input=broken_input)
            assert str(dataset.json_file) in str(error.value) and said in str(error.value)
            assert "BROKEN_INPUT" not in str(error.value) and "\n" not in str(error.value)
    dataset.content["categories"][0]["id"] = 7
    message = error_of(register_coco_folder, name, *dataset.write())
    assert "category 7" in message and "check_dataset.py" in message and "BROKEN_INPUT" not in message
    assert name not in DatasetCatalog


def test_broken_entries_are_counted_the_first_named_and_both_ways_out_shown(name, dataset):
    for image in dataset.content["images"][1:]:
        (dataset.image_root / image["file_name"]).unlink()
    (dataset.image_root / "1.png").write_bytes(b"")
    dataset.content["annotations"][1]["bbox"] = [1, 2, -3, 4]
    dataset.content["annotations"][2]["bbox"] = [60, 40, 20, 20]  # sticks out: only noted
    json_file, image_root = dataset.write()
    message = error_of(register_coco_folder, name, json_file, image_root)
    assert "7 broken entries" in message
    assert "5 x missing image, 1 x invalid box, 1 x empty image file" in message
    assert "annotation 2: bbox [1, 2, -3, 4]" in message and "annotation 3" not in message
    assert f"image 1: '{image_root}/1.png'" in message and f"image 2: '{image_root}/2.png'" in message
    assert "3.png" not in message and "..." in message
    assert f"check_dataset.py --json {json_file} --images {image_root}\n" in message
    assert "DATASETS.BROKEN_INPUT skip" in message
    assert name not in DatasetCatalog
    assert register_coco_folder(name, json_file, image_root, broken_input="skip") == ["plane", "car", "ship"]
    check = error_of(check_dataset, name, ["area", "segmentation"])
    assert "7 broken entries" in check and "--eval --masks" in check


def test_one_broken_entry(name, dataset):
    dataset.content["images"][0]["file_name"] = "elsewhere/1.png"
    message = error_of(register_coco_folder, name, *dataset.write())
    assert "1 broken entry" in message and "elsewhere/1.png" in message and "..." not in message


def test_a_corrected_json_is_read_again(name, dataset):
    dataset.content["images"][0]["file_name"] = "lost.jpg"
    error_of(register_coco_folder, name, *dataset.write())
    dataset.content["images"][0]["file_name"] = "1.png"
    assert register_coco_folder(name, *dataset.write()) == ["plane", "car", "ship"]


def test_check_of_a_set_registered_elsewhere(name, dataset):
    json_file, image_root = map(str, dataset.write())
    register_coco_instances(name, {}, json_file, image_root)
    assert dataset_classes(name) is None
    check_dataset(name)
    assert dataset_classes(name) == ["plane", "car", "ship"]
    (dataset.image_root / "1.png").unlink()
    assert "1.png'" in error_of(check_dataset, name)


def test_check_finds_other_classes_than_registered(name, dataset):
    json_file, image_root = map(str, dataset.write())
    register_coco_instances(name, {"thing_classes": ["car"]}, json_file, image_root)
    message = error_of(check_dataset, name)
    assert "1 (car)" in message and "3 (plane, car, ship)" in message


def test_check_accepts_cocos_test_images_without_annotations(name, dataset):
    del dataset.content["annotations"]
    dataset.json_file = dataset.json_file.with_name("image_info_test.json")
    json_file, image_root = map(str, dataset.write())
    register_coco_instances(name, {}, json_file, image_root)
    check_dataset(name)


def test_check_of_other_formats_looks_at_presence_only(name, dataset):
    json_file, image_root = map(str, dataset.write("not COCO's"))
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="lvis")
    check_dataset(name)
    os.remove(json_file)
    assert "no file" in error_of(check_dataset, name)


def test_check_passes_over_a_set_without_files(name):
    DatasetCatalog.register(name, list)
    check_dataset(name)
    assert dataset_classes(name) is None


@pytest.mark.parametrize("function", [check_dataset, dataset_classes])
def test_unknown_name_is_answered_with_near_ones(function):
    message = error_of(function, "coco_2017_trian")
    assert "coco_2017_train" in message and "register_coco_folder" in message
    assert "coco_2017_trian" not in MetadataCatalog.list()


@pytest.mark.parametrize("size, split", [("tiny", "train"), ("small", "val"), ("large", "train")])
def test_fashion_scenes_are_registered(size, split):
    scenes = f"fashion_scenes_{size}_{split}"
    assert scenes in DatasetCatalog
    metadata = MetadataCatalog.get(scenes)
    folder = os.path.join(DATASETS_ROOT, "fashion_scenes", size)
    assert metadata.json_file == os.path.join(folder, "annotations", f"instances_{split}.json")
    assert metadata.image_root == os.path.join(folder, "images", split)
    assert metadata.evaluator_type == "coco"
    assert dataset_classes(scenes) == CLASS_NAMES


@pytest.mark.slow
def test_absent_sets_name_the_variable_and_the_tool(tmp_path):
    # The variable is read once, at import: hence a process of its own.
    code = (
        "from mgd_det.data import check_dataset\n"
        "for name in ('coco_2017_train', 'fashion_scenes_small_val'):\n"
        "    try: check_dataset(name)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = dict(os.environ, DETECTRON2_DATASETS=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    coco, scenes = done.stdout.splitlines()
    assert coco.startswith("UserError") and scenes.startswith("UserError")
    assert str(tmp_path / "coco" / "annotations" / "instances_train2017.json") in coco
    assert "DETECTRON2_DATASETS" in coco and "DETECTRON2_DATASETS" in scenes
    assert "python tools/prepare_fashion_scenes.py small" in scenes


@pytest.mark.parametrize("key, use", [("area", "evaluator"), ("iscrowd", "evaluator"), ("segmentation", "mask heads")])
def test_keys_that_only_some_uses_need(name, dataset, key, use):
    del dataset.content["annotations"][3][key]
    register_coco_folder(name, *dataset.write())
    check_dataset(name)
    check_dataset(name, [k for k in ("area", "iscrowd", "segmentation") if k != key])
    assert re.search(f"annotation 4: no '{key}', and .*{use}", error_of(check_dataset, name, [key]))


def test_a_json_is_read_once(name, dataset, monkeypatch):
    paths = dataset.write()
    register_coco_folder(name, *paths)
    monkeypatch.setattr(register, "check_coco_json", None)
    register_coco_folder(name, *paths)
    check_dataset(name, ["area"])
