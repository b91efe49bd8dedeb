import json
import os
import subprocess
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mgd_det.data import CLASS_NAMES, DATASETS_ROOT, check_dataset, dataset_classes, register_coco_folder
from mgd_det.data.fashion_photos import FashionPhotos
from mgd_det.data.fashion_scenes import SceneSpec, write_fashion_scenes
from mgd_det.errors import UserError


def annotation(number, **changes):
    entry = {"id": number, "image_id": 1, "category_id": 7, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}
    return {**entry, **changes}


@pytest.fixture
def dataset(tmp_path):
    """A small set on disk; its parts, and a function that writes its json after they were changed."""

    class Dataset:
        json_file = tmp_path / "instances.json"
        image_root = tmp_path / "images"
        content = {
            "images": [
                {"id": i, "file_name": f"{folder}{i}.jpg", "height": 8, "width": 8}
                for i, folder in enumerate(["", "", "deep/er/", "", "", ""], start=1)
            ],
            "annotations": [annotation(1), annotation(2, category_id=3)],
            "categories": [{"id": 7, "name": "ship"}, {"id": 3, "name": "plane"}],
        }

        def write(self, text=None):
            self.json_file.write_text(json.dumps(self.content) if text is None else text)
            return self.json_file, self.image_root

    for image in Dataset.content["images"]:
        path = Dataset.image_root / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return Dataset()


@pytest.fixture
def name():
    yield "test_coco_folder"
    for registered in [n for n in DatasetCatalog.list() if n.startswith("test_coco_folder")]:
        DatasetCatalog.remove(registered)
        MetadataCatalog.remove(registered)


def error_of(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    return str(error.value)


def test_registers_with_classes_in_detectron2s_order(name, dataset):
    assert register_coco_folder(name, *dataset.write()) == ["plane", "ship"]
    assert dataset_classes(name) == ["plane", "ship"]
    check_dataset(name)
    records = DatasetCatalog.get(name)
    assert len(records) == 6
    classes = MetadataCatalog.get(name).thing_classes
    assert [classes[a["category_id"]] for a in records[0]["annotations"]] == ["ship", "plane"]


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
    assert register_coco_folder(name, "../instances.json", ".") == ["plane", "ship"]
    assert DatasetCatalog[name] is loader


def test_a_taken_name(name, dataset):
    register_coco_folder(name, *dataset.write())
    message = error_of(register_coco_folder, name, dataset.json_file, dataset.image_root / "deep")
    assert name in message and "taken" in message and "another name" in message


def test_absent_json(name, dataset):
    message = error_of(register_coco_folder, name, dataset.json_file, dataset.image_root)
    assert str(dataset.json_file) in message and "no file" in message
    assert name not in DatasetCatalog


def test_absent_image_folder(name, dataset):
    json_file, _ = dataset.write()
    assert "no image folder" in error_of(register_coco_folder, name, json_file, dataset.image_root / "x")


@pytest.mark.parametrize("text", ['{"images": [', "", "\x00\x01"])
def test_json_that_does_not_parse(name, dataset, text):
    message = error_of(register_coco_folder, name, *dataset.write(text))
    assert str(dataset.json_file) in message and "as json" in message


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c.pop("annotations"), "no list 'annotations'"),
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c.update(categories={"1": "ship"}), "no list 'categories'"),
        (lambda c: c.update(categories=[]), "'categories' is empty"),
        (lambda c: c.update(images=[]), "'images' is empty"),
        (lambda c: c["images"][4].pop("height"), "entry 4 of 'images' has no 'height'"),
        (lambda c: c["annotations"][1].pop("bbox"), "entry 1 of 'annotations' has no 'bbox'"),
        (lambda c: c["annotations"].append(annotation(5, category_id=4)), "annotation 5 has category_id 4"),
        (lambda c: c["annotations"].append(annotation(2)), "3 annotations have 2 ids"),
    ],
)
def test_json_that_is_not_cocos(name, dataset, change, said):
    change(dataset.content)
    message = error_of(register_coco_folder, name, *dataset.write())
    assert said in message and "COCO's instances format" in message


def test_a_list_is_not_coco(name, dataset):
    assert "it holds a list" in error_of(register_coco_folder, name, *dataset.write("[]"))


def test_missing_images_are_counted_and_the_first_named(name, dataset):
    for image in dataset.content["images"][1:]:
        (dataset.image_root / image["file_name"]).unlink()
    message = error_of(register_coco_folder, name, *dataset.write())
    assert "5 of the 6 images" in message
    assert "2.jpg, deep/er/3.jpg, 4.jpg, ..." in message and "5.jpg" not in message


def test_missing_subfolder(name, dataset):
    dataset.content["images"][0]["file_name"] = "elsewhere/1.jpg"
    assert "elsewhere/1.jpg" in error_of(register_coco_folder, name, *dataset.write())


def test_a_mended_json_is_read_again(name, dataset):
    dataset.content["images"][0]["file_name"] = "lost.jpg"
    error_of(register_coco_folder, name, *dataset.write())
    dataset.content["images"][0]["file_name"] = "1.jpg"
    assert register_coco_folder(name, *dataset.write()) == ["plane", "ship"]


def test_check_of_a_set_registered_elsewhere(name, dataset):
    json_file, image_root = map(str, dataset.write())
    register_coco_instances(name, {}, json_file, image_root)
    assert dataset_classes(name) is None
    check_dataset(name)
    assert dataset_classes(name) == ["plane", "ship"]
    (dataset.image_root / "1.jpg").unlink()
    assert "1 of the 6 images" in error_of(check_dataset, name)


def test_check_finds_other_classes_than_registered(name, dataset):
    json_file, image_root = map(str, dataset.write())
    register_coco_instances(name, {"thing_classes": ["car"]}, json_file, image_root)
    message = error_of(check_dataset, name)
    assert "1 (car)" in message and "2 (plane, ship)" in message


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


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_fashion_scenes_are_registered(size, split):
    scenes = f"fashion_scenes_{size}_{split}"
    assert scenes in DatasetCatalog
    metadata = MetadataCatalog.get(scenes)
    folder = os.path.join(DATASETS_ROOT, "fashion_scenes", size)
    assert metadata.json_file == os.path.join(folder, "annotations", f"instances_{split}.json")
    assert metadata.image_root == os.path.join(folder, "images", split)
    assert metadata.evaluator_type == "coco"
    assert dataset_classes(scenes) == CLASS_NAMES


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
def test_keys_that_only_some_uses_need(tmp_path, key, use):
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}],
        "annotations": [
            {
                "id": 5,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, 2, 2],
                "area": 4,
                "iscrowd": 0,
                "segmentation": [],
            }
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    del content["annotations"][0][key]
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.json").write_text(json.dumps(content))
    name = f"keys_{key}"
    register_coco_folder(name, tmp_path / "a.json", tmp_path)
    check_dataset(name)
    check_dataset(name, [k for k in ("area", "iscrowd", "segmentation") if k != key])
    with pytest.raises(UserError, match=f"annotation 5 of .* has no '{key}', and .*{use}"):
        check_dataset(name, [key])
