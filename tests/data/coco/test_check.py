"""Every kind of problem of a json, one at a time."""

import copy
import json
import math

import coco_data
import numpy as np
import pycocotools.mask as mask_util
import pytest
from coco_data import SIZE, annotation, plain_rle, rle

from mgd_det.data.coco import problems as kinds
from mgd_det.data.coco.check import check_coco_content, check_coco_json

POLYGON = [8, 10, 28, 10, 28, 22]
NAN, INF = math.nan, math.inf


def problems_of(change, annotation_keys=("area", "iscrowd", "segmentation"), json_file="a.json"):
    content = coco_data.content()
    change(content)
    before = copy.deepcopy(content)
    problems = check_coco_content(json_file, content).problems_for(annotation_keys)
    assert repr(content) == repr(before)
    return problems


def test_a_valid_set():
    report = check_coco_content("a.json", coco_data.content())
    assert report.problems_for(["area", "iscrowd", "segmentation", "polygons"]) == []
    assert report.classes == ("plane", "car", "ship")  # by id
    assert [(image.id, image.file_name, image.height, image.width) for image in report.images] == [
        (i, f"{i}.png", *SIZE) for i in range(1, 7)
    ]
    assert report.num_annotations == 5 and report.rle_object is None


@pytest.mark.parametrize("text", ['{"images": [', "", "\x00\x01", b"\xff\xfe"])
def test_json_that_does_not_parse(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    (problem,) = check_coco_json(str(file)).problems
    assert problem.kind == kinds.UNREADABLE_JSON and problem.is_fatal
    assert str(file) in problem.message and "as json" in problem.message


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c.pop("annotations"), "no list 'annotations'"),
        (lambda c: c.update(categories={"1": "ship"}), "no list 'categories'"),
        (lambda c: c.update(images=[]), "'images' is empty"),
        (lambda c: c.update(categories=[]), "'categories' is empty"),
    ],
)
def test_missing_parts(change, said):
    (problem,) = problems_of(change)
    assert problem.kind == kinds.WRONG_SHAPE and problem.is_fatal
    assert said in str(problem) and "COCO's instances format" in str(problem)


def test_a_list_is_not_coco():
    (problem,) = check_coco_content("a.json", []).problems
    assert "it holds a list" in str(problem) and problem.is_fatal


def test_only_cocos_test_images_need_no_annotations():
    def change(content):
        del content["annotations"]

    assert problems_of(change, json_file="/x/image_info_test.json") == []
    assert len(problems_of(change, json_file="/image_info/test.json")) == 1


# What is wrong, its kind, the entry that is named (None: its place is), and a part of what is said.
BREAKING = [
    (lambda c: c["images"].append(3), kinds.WRONG_SHAPE, None, "entry 6 of 'images': 3 is not an object"),
    (lambda c: c["images"][4].pop("height"), kinds.MISSING_KEY, 5, "image 5: no 'height'"),
    (lambda c: c["images"][5].pop("id"), kinds.MISSING_KEY, None, "entry 5 of 'images': no 'id'"),
    (lambda c: c["images"][0].update(width=0), kinds.WRONG_VALUE, 1, "width 0"),
    (lambda c: c["images"][0].update(width=64.5), kinds.WRONG_VALUE, 1, "width 64.5"),
    (lambda c: c["images"][0].update(height="48"), kinds.WRONG_VALUE, 1, "height '48'"),
    (lambda c: c["images"][0].update(height=INF), kinds.WRONG_VALUE, 1, "height inf"),
    (lambda c: c["images"][0].update(file_name=None), kinds.WRONG_VALUE, 1, "file_name None"),
    (lambda c: c["images"][5].update(id="6"), kinds.WRONG_VALUE, None, "id '6'"),
    (lambda c: c["images"][5].update(id=None), kinds.WRONG_VALUE, None, "id None"),
    (lambda c: c["images"][0].update(id="1"), kinds.WRONG_VALUE, None, "id '1'"),
    (lambda c: c["images"][5].update(id=2.5), kinds.WRONG_VALUE, None, "id 2.5"),
    (lambda c: c["images"][5].update(id=2**63), kinds.WRONG_VALUE, None, "id 9223372036854775808"),
    (lambda c: c["images"][5].update(id=NAN), kinds.WRONG_VALUE, None, "id nan"),
    (lambda c: c["images"][5].update(height=10**400), kinds.WRONG_VALUE, 6, "two whole numbers > 0"),
    (lambda c: c["images"][5].update(id=2), kinds.DUPLICATE_ID, 2, "same id"),
    (lambda c: c["annotations"][1].update(id=2.5), kinds.WRONG_VALUE, None, "id 2.5"),
    (lambda c: c["annotations"][1].update(image_id=2.5), kinds.WRONG_VALUE, 2, "image_id 2.5"),
    (lambda c: c["annotations"][1].update(category_id=7.5), kinds.WRONG_VALUE, 2, "category_id 7.5"),
    (lambda c: c["annotations"][1].update(category_id=True), kinds.WRONG_VALUE, 2, "category_id True"),
    (lambda c: c["annotations"][1].update(iscrowd=0.5), kinds.WRONG_VALUE, 2, "iscrowd 0.5"),
    (lambda c: c["images"][0].update(width=True), kinds.WRONG_VALUE, 1, "width True"),
    (lambda c: c["images"][5].update(id=2.0), kinds.DUPLICATE_ID, 2, "same id"),
    (lambda c: c["categories"][1].pop("name"), kinds.MISSING_KEY, 7, "category 7: no 'name'"),
    (lambda c: c["categories"].append({"id": 7, "name": "x"}), kinds.DUPLICATE_ID, 7, "category 7"),
    (lambda c: c["categories"].append({"id": 8, "name": 1}), kinds.WRONG_VALUE, 8, "name 1"),
    (lambda c: c["categories"].append({"id": 8, "name": "\ud800"}), kinds.WRONG_VALUE, 8, "name"),
    (lambda c: c["categories"].append({"id": NAN, "name": "x"}), kinds.WRONG_VALUE, None, "id nan"),
    (lambda c: c["annotations"].append(None), kinds.WRONG_SHAPE, None, "entry 5 of 'annotations'"),
    (lambda c: c["annotations"][1].pop("bbox"), kinds.MISSING_KEY, 2, "annotation 2: no 'bbox'"),
    (lambda c: c["annotations"][1].update(id=1), kinds.DUPLICATE_ID, 1, "annotation 1"),
    (lambda c: c["annotations"][1].update(id="b"), kinds.WRONG_VALUE, None, "id 'b'"),
    (lambda c: c["annotations"][1].update(image_id=9), kinds.UNKNOWN_IMAGE, 2, "image_id 9 is not"),
    (lambda c: c["annotations"][1].update(image_id="2"), kinds.UNKNOWN_IMAGE, 2, "image_id '2' is not"),
    (lambda c: c["annotations"][1].update(image_id=[2]), kinds.WRONG_VALUE, 2, "image_id [2]"),
    (lambda c: c["annotations"][1].update(image_id=True), kinds.WRONG_VALUE, 2, "image_id True"),
    (lambda c: c["annotations"][1].update(category_id=[7]), kinds.WRONG_VALUE, 2, "category_id [7]"),
    (lambda c: c["annotations"][1].update(keypoints=[1, None, 2]), kinds.WRONG_VALUE, 2, "keypoints [1, None, 2]"),
    (lambda c: c["annotations"][1].update(keypoints=5), kinds.WRONG_VALUE, 2, "keypoints 5"),
    (lambda c: c["annotations"][1].update(category_id=1), kinds.UNKNOWN_CATEGORY, 2, "category_id 1 is not"),
    (lambda c: c["annotations"][1].update(iscrowd=None), kinds.WRONG_VALUE, 2, "iscrowd None"),
    (lambda c: c["annotations"][1].update(ignore=1), kinds.WRONG_VALUE, 2, "'ignore' is set"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, NAN, 3]), kinds.INVALID_BOX, 2, "not finite"),
    (lambda c: c["annotations"][1].update(bbox=[64, 0, 5, 5]), kinds.BOX_OUTSIDE, 2, "64 x 48"),
    (lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]), kinds.INVALID_POLYGON, 2, "no valid polygon"),
    (lambda c: c["annotations"][1].update(segmentation={"size": [4, 4], "counts": [16]}), kinds.INVALID_RLE, 2, "size"),
    (lambda c: c["annotations"][1].pop("area"), kinds.MISSING_KEY, 2, "no 'area', and COCO's evaluator"),
    (lambda c: c["annotations"][1].update(area=None), kinds.MISSING_KEY, 2, "no 'area', and COCO's evaluator"),
    (lambda c: c["annotations"][1].update(area=NAN), kinds.MISSING_KEY, 2, "no 'area', and COCO's evaluator"),
    (lambda c: c["annotations"][1].update(area=-1), kinds.MISSING_KEY, 2, "no 'area', and COCO's evaluator"),
    (lambda c: c["annotations"][1].update(area=1e11), kinds.MISSING_KEY, 2, "no 'area', and COCO's evaluator"),
    (lambda c: c["annotations"][1].pop("iscrowd"), kinds.MISSING_KEY, 2, "no 'iscrowd', and COCO's evaluator"),
    (lambda c: c["annotations"][1].pop("segmentation"), kinds.MISSING_KEY, 2, "no 'segmentation', and mask heads"),
    (lambda c: c["annotations"][1].update(segmentation=[]), kinds.MISSING_KEY, 2, "no 'segmentation', and mask heads"),
]  # fmt: skip


@pytest.mark.parametrize("change, kind, entry, said", BREAKING)
def test_what_breaks(change, kind, entry, said):
    problems = problems_of(change)
    problem = problems[0]
    assert (problem.kind, problem.entry, problem.breaks) == (kind, entry, True)
    assert said in str(problem) and problem.file == "a.json"
    assert problem.is_fatal == (problem.part == "categories")
    # The annotations of a category or of an image without id fall with it; nothing else is blamed.
    assert {p.kind for p in problems[1:]} <= {kinds.UNKNOWN_CATEGORY, kinds.UNKNOWN_IMAGE}


def test_annotations_are_not_blamed_for_their_image():
    for key in ("height", "file_name"):
        assert len(problems_of(lambda c, key=key: c["images"][0].pop(key))) == 1


def test_all_problems_in_one_pass():
    def change(content):
        content["images"][0]["width"] = -1
        content["annotations"][1].update(bbox=[0, 0], segmentation=[[1, 2]], category_id=4)
        content["annotations"][2].update(bbox=[0, 0, -1, 2])

    found = [(p.part, p.place, p.entry, p.kind) for p in problems_of(change)]
    assert found == [
        ("images", 0, 1, kinds.WRONG_VALUE),
        ("annotations", 1, 2, kinds.UNKNOWN_CATEGORY),
        ("annotations", 1, 2, kinds.INVALID_BOX),
        ("annotations", 1, 2, kinds.INVALID_POLYGON),
        ("annotations", 2, 3, kinds.INVALID_BOX),
    ]


NOTED = [
    (lambda c: c["annotations"][1].update(bbox=[60, 40, 30, 30]), kinds.BOX_STICKS_OUT),
    (lambda c: c["annotations"][1].update(bbox=[-4, 0, 30, 30]), kinds.BOX_STICKS_OUT),
    # COCO's annotation 918 of train2017
    (lambda c: c["annotations"][1].update(bbox=[29.65, 38.33, 1.03, 0.0], area=0.0), kinds.EMPTY_BOX),
    (lambda c: c["annotations"][1].update(bbox=[64, 48, 0, 0]), kinds.EMPTY_BOX),
    (lambda c: c["annotations"][1].update(segmentation=[POLYGON, [1, 2]]), kinds.INVALID_POLYGON),
    (lambda c: c["categories"][1].update(name="ship"), kinds.DUPLICATE_CLASS),
    (lambda c: c["annotations"][1].update(id=0), kinds.ID_ZERO),
]


@pytest.mark.parametrize("change, kind", NOTED)
def test_what_is_only_noted(change, kind):
    (problem,) = problems_of(change)
    assert problem.kind == kind and not problem.breaks and not problem.is_fatal


def test_repeated_ids_of_minival_are_noted():
    def change(content):
        content["annotations"][1]["id"] = 1

    (problem,) = problems_of(change, json_file="instances_minival2014.json")
    assert problem.kind == kinds.DUPLICATE_ID and not problem.breaks


def test_what_passes_without_a_problem():
    def change(content):
        mask = np.zeros(SIZE)
        mask[3:9, 5:20] = 1
        content["info"] = content["licenses"] = None
        content["images"][0].update(license=1, coco_url="x", height=48.0)
        content["annotations"] += [
            annotation(11, iscrowd=1, segmentation=plain_rle(mask)),
            annotation(12, iscrowd=1, segmentation=rle(mask)),
            annotation(13, segmentation=rle(mask), keypoints=[1, 2, 2] * 17, num_keypoints=17, score=0.5),
            annotation(14, bbox=[-0.6, 0, 65.2, 48.9], iscrowd=False, ignore=0, attributes={"x": []}),
        ]

    assert problems_of(change) == []
    assert problems_of(lambda c: c["images"][5].update(file_name="2.png")) == []  # one file, two ids
    content = coco_data.content()
    for image in content["images"]:
        image["id"] = str(image["id"])
    for entry in content["annotations"]:
        entry["image_id"] = str(entry["image_id"])
    assert check_coco_content("a.json", content).problems == []


def test_keypoints():
    def change(content, **changes):
        for entry in content["annotations"]:
            entry.update(keypoints=[9, 11, 2] * 3, num_keypoints=3)
        content["annotations"][1].update(changes)

    for changes in ({}, {"num_keypoints": 3.0}, {"num_keypoints": True}):
        assert not any(p.breaks for p in problems_of(lambda c, new=changes: change(c, **new), ["keypoints"]))
    for changes in ({"keypoints": []}, {"keypoints": [9, 11, 2] * 2}, {"num_keypoints": None}):
        (problem,) = [p for p in problems_of(lambda c, new=changes: change(c, **new), ["keypoints"]) if p.breaks]
        assert (problem.kind, problem.entry) == (kinds.MISSING_KEY, 2) and "'keypoints'" in str(problem)
        assert problems_of(lambda c, new=changes: change(c, **new)) == []
    (problem,) = [p for p in problems_of(lambda c: None, ["keypoints"]) if p.breaks]
    assert problem.is_fatal and "'keypoints'" in str(problem) and "MODEL.KEYPOINT_ON" in str(problem)


def test_keys_that_the_use_does_not_read_are_noted_once():
    def change(content):
        for entry in content["annotations"]:
            del entry["area"], entry["segmentation"]

    found = {(p.entry, p.breaks): str(p) for p in problems_of(change, ["area"])}
    assert set(found) == {(i, True) for i in range(1, 6)} | {(None, False)}
    assert "5 annotations (the first: 1) have no 'segmentation'" in found[None, False]


def test_rle_where_polygons_are_needed():
    def change(content):
        content["annotations"][0].update(iscrowd=1, segmentation=rle(np.ones(SIZE)))
        content["annotations"][2].update(segmentation=rle(np.ones(SIZE)))

    assert problems_of(change) == []
    (problem,) = problems_of(change, ["polygons"])
    assert problem.is_fatal and "annotation 3" in str(problem) and "INPUT.MASK_FORMAT" in str(problem)


@pytest.mark.parametrize("first", [[], [1, 2], [1, 2, 3, 4]])
def test_masks_that_training_can_read_and_the_evaluator_cannot(first):
    def change(content):
        content["annotations"][1]["segmentation"] = [first, POLYGON]

    assert not any(problem.breaks for problem in problems_of(change, ["segmentation"]))
    (problem,) = [p for p in problems_of(change, ["segmentation", "area"]) if p.breaks]
    assert problem.kind == kinds.INVALID_POLYGON and (problem.entry, problem.place) == (2, 1)
    with pytest.raises((Exception, TypeError)):  # noqa: B017  (pycocotools has no type of its own)
        mask_util.frPyObjects([first, POLYGON], *SIZE)


def test_one_id_of_another_type_does_not_break_the_others():
    for part in ("images", "categories"):
        problems = problems_of(lambda c, part=part: c[part][0].update(id=0.5))
        assert [(p.part, p.place) for p in problems if p.kind == kinds.WRONG_VALUE] == [(part, 0)]


def test_ids_that_are_not_whole_are_wrong_even_if_all_are():
    for part in ("images", "categories", "annotations"):
        problems = problems_of(lambda c, part=part: [entry.update(id=entry["id"] + 0.5) for entry in c[part]])
        count = len(coco_data.content()[part])
        assert [(p.part, p.place) for p in problems if p.kind == kinds.WRONG_VALUE] == [(part, i) for i in range(count)]


def test_every_problem_can_be_shown():
    def change(content):
        content["images"][0].update(id="\ud800", width=0)
        content["images"][1].update(file_name="\ud800/1.png", height=0)
        content["annotations"][3].update(id=10**4000, bbox=None)

    for problem in problems_of(change):
        assert len(str(problem).encode("utf-8")) < 300


def test_what_is_nested_deeply_is_refused_or_can_be_read_again(tmp_path):
    from detectron2.data.datasets import load_coco_json

    accepted = []
    for levels in (50, 300, *range(600, 1000, 10)):
        content = json.dumps(coco_data.content(info="here"))
        file = tmp_path / f"{levels}.json"
        for place in ('"here"', '"1.png", '):
            nested = "[" * levels + "]" * levels
            file.write_text(content.replace(place, nested if "here" in place else f'{place}"x": {nested}, '))
            if not check_coco_json(str(file)).problems:
                accepted.append((levels, place))
                load_coco_json(str(file), "")
    assert (50, '"here"') in accepted and (300, '"1.png", ') in accepted
    assert (300, '"here"') not in accepted


def test_what_the_checker_lets_pass_detectron2_loads(tmp_path):
    """Detectron2's own loader reads what is only noted and what passes without a note."""
    from detectron2.data.datasets import load_coco_json

    content = coco_data.content()
    for change, kind in NOTED:
        if kind != kinds.DUPLICATE_CLASS:
            fresh = coco_data.content()
            change(fresh)
            entry = next(e for e, valid in zip(fresh["annotations"], content["annotations"]) if e != valid)
            content["annotations"].append({**entry, "id": len(content["annotations"]) + 10})
    (tmp_path / "a.json").write_text(json.dumps(content))
    records = load_coco_json(str(tmp_path / "a.json"), str(tmp_path))
    assert sum(len(record["annotations"]) for record in records) == len(content["annotations"])
