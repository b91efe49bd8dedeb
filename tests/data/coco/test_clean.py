"""Sets that are written without their broken entries."""

import json

import coco_data
import pytest
from coco_data import annotation
from detectron2.data import DatasetCatalog, MetadataCatalog

from mgd_det.data import check_dataset, register_coco_folder, without_broken_entries
from mgd_det.data.coco.clean import register_without_broken
from mgd_det.errors import UserError

NAME = "test_without_broken"


@pytest.fixture(autouse=True)
def catalog():
    yield
    coco_data.forget(NAME)


def make(root, change, name=NAME, json_name="instances.json"):
    content = coco_data.content()
    json_file, images = coco_data.write(root, content, json_name)
    change(content, images)
    json_file.write_text(json.dumps(content))
    register_coco_folder(name, json_file, images, broken_input="skip")
    return content


def left(cleaned):
    with open(cleaned.json_file) as file:
        content = json.load(file)
    return [image["id"] for image in content["images"]], [a["id"] for a in content.get("annotations", [])], content


def rows(summary):
    lines = [line.rsplit(maxsplit=1) for line in summary.splitlines()]
    return {line[0].strip(): int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}


def test_nothing_is_written_of_a_sound_set(tmp_path):
    make(tmp_path, lambda content, images: content["annotations"][0].update(bbox=[60, 40, 30, 30]))
    cleaned = without_broken_entries(NAME, str(tmp_path / "out"), ["area"], decode=True)
    assert not any(cleaned) and not (tmp_path / "out").exists()


def test_what_is_left_out(tmp_path):
    def change(content, images):
        (images / "1.png").unlink()
        coco_data.truncate(images / "2.png")
        content["annotations"] += [annotation(11, image_id=1), annotation(12, image_id=3, bbox=[1, 2, 3])]
        content["annotations"] += [annotation(13, image_id=99), "x", annotation(14, image_id=5, bbox=[1, 1, -1, 1])]
        content["annotations"][3].update(category_id=8)  # the only one of image 4
        content["info"] = {"year": 2020}

    content = make(tmp_path, change)
    out = tmp_path / "out" / "datasets"
    cleaned = without_broken_entries(NAME, str(out))
    images, annotations, written = left(cleaned)
    # 6 had no annotation before; 4 lost its own; 2 is broken in a way that only reading it shows.
    assert images == [2, 3, 5, 6] and annotations == [2, 3, 5]
    assert written["categories"] == content["categories"] and written["info"] == content["info"]
    assert cleaned.name == f"{NAME}_without_broken"
    assert cleaned.json_file == str(out / f"{NAME}_without_broken.json")
    assert [path.name for path in out.iterdir()] == [f"{NAME}_without_broken.json"]
    assert rows(cleaned.summary) == {
        "missing image": 1,
        "invalid box": 2,
        "unknown image": 1,
        "unknown category": 1,
        "wrong shape": 1,
        "(annotations of these images)": 2,
        "(images that lost all annotations)": 1,
    }
    assert "4 images, 3 annotations are left" in cleaned.summary and cleaned.json_file in cleaned.summary

    seen = []
    decoded = without_broken_entries(NAME, str(out), decode=True, progress=lambda *counts: seen.append(counts))
    assert left(decoded)[:2] == ([3, 5, 6], [3, 5]) and rows(decoded.summary)["unreadable image"] == 1
    assert seen[-1] == (5, 5)


def test_the_new_set_is_registered_as_the_old(tmp_path):
    make(tmp_path, lambda content, images: (images / "1.png").unlink())
    MetadataCatalog.get(NAME).set(thing_colors=[(1, 2, 3)] * 3)
    cleaned = without_broken_entries(NAME, str(tmp_path / "out"))
    for _ in range(2):  # as a second training in the same process does
        register_without_broken(NAME, cleaned)
        old, new = MetadataCatalog.get(NAME), MetadataCatalog.get(cleaned.name)
        assert new.json_file == cleaned.json_file and new.image_root == old.image_root
        for key in ("thing_classes", "evaluator_type", "thing_colors"):
            assert new.get(key) == old.get(key)
        assert [record["image_id"] for record in DatasetCatalog.get(cleaned.name)] == [2, 3, 4, 5, 6]


def test_broken_masks_cost_the_object_only_where_masks_are_learned(tmp_path):
    def change(content, images):
        content["annotations"][0].update(segmentation=[[1, 2, 3, 4]])
        content["annotations"][1].update(segmentation={"size": [1, 1], "counts": [1]})
        content["annotations"][2].update(segmentation=[[]], bbox=[0, 0, -1, 1])

    make(tmp_path, change)
    boxes = without_broken_entries(NAME, str(tmp_path / "boxes"))
    images, annotations, written = left(boxes)
    assert images == [1, 2, 4, 5, 6] and annotations == [1, 2, 4, 5]
    assert ["segmentation" in a for a in written["annotations"]] == [False, False, True, True]
    assert rows(boxes.summary)["(kept, without its mask)"] == 2
    masks = without_broken_entries(NAME, str(tmp_path / "masks"), ["segmentation"])
    assert left(masks)[:2] == ([4, 5, 6], [4, 5])
    # Detectron2 loads all objects that are left.
    register_without_broken(NAME, boxes)
    assert sum(len(record["annotations"]) for record in DatasetCatalog.get(boxes.name)) == 4


def test_missing_keys_are_broken_where_they_are_needed(tmp_path):
    make(tmp_path, lambda content, images: content["annotations"][0].pop("area"))
    assert not any(without_broken_entries(NAME, str(tmp_path / "out")))
    assert left(without_broken_entries(NAME, str(tmp_path / "out"), ["area"]))[1] == [2, 3, 4, 5]


def test_of_an_id_twice_the_first_stays_and_of_a_file_twice_both(tmp_path):
    def change(content, images):
        content["images"].append({**content["images"][0], "file_name": "2.png"})  # id 1 again
        content["images"].append({**content["images"][0], "id": 9})  # 1.png again
        content["annotations"] += [annotation(1, image_id=3), annotation(19, image_id=9)]

    make(tmp_path, change)
    images, annotations, written = left(without_broken_entries(NAME, str(tmp_path / "out")))
    assert images == [1, 2, 3, 4, 5, 6, 9] and annotations == [1, 2, 3, 4, 5, 19]
    assert written["images"][0]["file_name"] == "1.png" and written["annotations"][0]["image_id"] == 1


def test_a_subset_of_the_images(tmp_path):
    """Its json may still have the annotations of all images, or its folder only some of them."""
    for case, name in (("json", NAME), ("folder", NAME + "b")):

        def change(content, images, case=case):
            if case == "json":
                content["images"] = [image for image in content["images"] if image["id"] in (2, 3, 6)]
            else:
                for number in (1, 4, 5):
                    (images / f"{number}.png").unlink()

        make(tmp_path / case, change, name)
        with pytest.raises(UserError, match="subset.*DATASETS.BROKEN_INPUT skip"):
            check_dataset(name)
        assert left(without_broken_entries(name, str(tmp_path / "out")))[:2] == ([2, 3, 6], [2, 3])


def test_numbers_are_written_as_whole_numbers(tmp_path):
    def change(content, images):
        content["images"][0].update(id=1.0, width=64.0)
        content["annotations"][0].update(iscrowd=True, segmentation={"size": [48.0, 64.0], "counts": [3072.0]})

    make(tmp_path, change)
    cleaned = without_broken_entries(NAME, str(tmp_path / "out"))
    images, annotations, written = left(cleaned)
    assert images == [1, 2, 3, 4, 5, 6] and annotations == [1, 2, 3, 4, 5] and not rows(cleaned.summary)
    assert json.dumps(written["images"][0]) == '{"id": 1, "file_name": "1.png", "height": 48, "width": 64}'
    rle = written["annotations"][0].pop("segmentation")
    assert (
        json.dumps(rle) == '{"size": [48, 64], "counts": [3072]}' and written["annotations"][0]["iscrowd"] is not True
    )
    register_without_broken(NAME, cleaned)
    assert MetadataCatalog.get(cleaned.name).json_file == cleaned.json_file


def test_repeated_ids_of_minival_do_not_survive_under_another_name(tmp_path):
    def change(content, images):
        content["annotations"].append(annotation(2, image_id=5))
        (images / "1.png").unlink()

    make(tmp_path, change, json_name="minival.json")
    cleaned = without_broken_entries(NAME, str(tmp_path / "out"))
    register_without_broken(NAME, cleaned)
    assert len(DatasetCatalog.get(cleaned.name)) == 5  # Detectron2 refuses repeated ids elsewhere


def test_test_images_without_annotations(tmp_path):
    def change(content, images):
        del content["annotations"]
        coco_data.truncate(images / "2.png")

    make(tmp_path, change, json_name="image_info_test.json")
    _, _, written = left(without_broken_entries(NAME, str(tmp_path / "out"), ["area"], decode=True))
    assert len(written["images"]) == 5 and "annotations" not in written


def test_what_cannot_be_written(tmp_path):
    make(tmp_path, lambda content, images: [path.unlink() for path in images.iterdir()])
    with pytest.raises(UserError, match="nothing is left"):
        without_broken_entries(NAME, str(tmp_path / "out"))
    make(tmp_path / "b", lambda content, images: (images / "1.png").unlink(), name=NAME + "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out.*cannot be written"):
        without_broken_entries(NAME + "b", str(tmp_path / "file" / "out"))


def test_sets_that_are_not_cocos_stay(tmp_path):
    DatasetCatalog.register(NAME, list)
    assert not any(without_broken_entries(NAME, str(tmp_path)))


def test_what_is_nested_too_deeply_to_be_written_is_an_error(tmp_path):
    ends = []
    for levels in (100, 800, 3000):
        name = f"{NAME}_{levels}"
        content = coco_data.content()
        content["annotations"][0]["bbox"] = None
        json_file, images = coco_data.write(tmp_path / name, content)
        nested = "[" * levels + "]" * levels
        json_file.write_text(json_file.read_text().replace('"1.png", ', f'"1.png", "x": {nested}, '))
        try:
            register_coco_folder(name, json_file, images, broken_input="skip")
            register_without_broken(name, without_broken_entries(name, str(tmp_path)))
            ends.append(len(DatasetCatalog.get(name + "_without_broken")))
        except UserError as error:
            assert "recursion" in str(error)
            ends.append("refused")
    assert ends[0] == 5 and ends[-1] == "refused"
