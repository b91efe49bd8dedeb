"""Broken data sets are refused by one message of ours, or what is loaded of them is right."""

import contextlib
import io
import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from typing import Any, List, Optional, Sequence, Tuple

import coco_data
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from fuzz.budget import examples
from fuzz.coco_mutations import BrokenSet, broken_sets, retyped, sound_content, write_images
from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from mgd_det.data import CheckedMapper, check_dataset, register_coco_folder, without_broken_entries
from mgd_det.data.coco.clean import register_without_broken
from mgd_det.errors import UserError

PREFIX = "fuzzed_"
USES = {  # annotation_keys of check_dataset, and the format of masks
    "boxes": ((), None),
    "evaluated boxes": (("area", "iscrowd"), None),
    "polygons": (("segmentation", "polygons"), "polygon"),
    "evaluated masks": (("area", "iscrowd", "segmentation"), "bitmask"),
    "evaluated keypoints": (("area", "iscrowd", "keypoints"), None),
}
TASKS = {"bbox", "box_proposals", "segmentation", "keypoints"}  # of COCOEvaluator; "segmentation" is its "segm"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    write_images(root)
    return root


@pytest.fixture(autouse=True)
def silence():
    """Hide the warnings that Detectron2 repeats for each set."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("use", list(USES))
@examples(ci=75, nightly=1500)
@given(data=st.data())
def test_refused_or_right(root, use, data):
    keys, mask_format = USES[use]
    broken = data.draw(broken_sets(*_contents(keys)))
    name, file = _written(root, broken)
    try:
        try:
            register_coco_folder(name, file, root / "images")
            check_dataset(name, keys)
        except UserError as error:
            _check_message(error, str(file))
            event("refused")
            return
        content = json.loads(broken.text)
        records = DatasetCatalog.get(name)
        _check_records(records, content, content["annotations"])
        if "area" in keys:
            _check_evaluation(name, records, keys)
        _check_mapped(records, mask_format, may_refuse=True)
    finally:
        coco_data.forget(PREFIX)
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("use", list(USES))
@examples(ci=40, nightly=800)
@given(data=st.data())
def test_skipped_is_right(root, use, data):
    keys, mask_format = USES[use]
    broken = data.draw(broken_sets(*_contents(keys)))
    name, file = _written(root, broken)
    try:
        try:
            register_coco_folder(name, file, root / "images", broken_input="skip")
            cleaned = without_broken_entries(name, str(root / "cleaned"), keys, decode=True)
        except UserError as error:
            _check_message(error, str(file))
            event("refused")
            return
        if cleaned.name:
            register_without_broken(name, cleaned)
            name, file_read = cleaned.name, cleaned.json_file
        else:
            file_read = str(file)
        with open(file_read, encoding="utf-8") as opened:
            content = json.load(opened)
        whole = json.loads(broken.text)
        _check_nothing_is_made_up(content, whole)
        _check_sound_entries_are_kept(content, whole, sound_content(*_contents(keys)))
        records = DatasetCatalog.get(name)
        _check_records(records, content, content["annotations"])
        if "area" in keys:
            _check_evaluation(name, records, keys)
        _check_mapped(records, mask_format, may_refuse=False)
    finally:
        coco_data.forget(PREFIX)
        file.unlink()


@pytest.mark.parametrize("new_type", [int, float])
def test_the_sound_set_is_taken_whole(root, new_type):
    """What the tests above would let pass if everything were refused."""
    for keys, mask_format in USES.values():
        content = retyped(sound_content(*_contents(keys)), new_type)
        name, file = _written(root, BrokenSet(json.dumps(content).encode(), []))
        register_coco_folder(name, file, root / "images")
        check_dataset(name, keys)
        records = DatasetCatalog.get(name)
        assert sum(len(record["annotations"]) for record in records) == 6
        _check_records(records, content, content["annotations"])
        if "area" in keys:
            assert _check_evaluation(name, records, keys) == len(TASKS & {"bbox", "box_proposals", *keys})
        _check_mapped(records, mask_format, may_refuse=False)
        cleaned = without_broken_entries(name, str(root), keys, decode=True)
        assert bool(cleaned.name) == (new_type is float)
        coco_data.forget(PREFIX)


# ------------------------------------------------------------------ what is asked of the outcome
def _written(root, broken: BrokenSet):
    number = next(_numbers)
    file = root / f"{number}.json"
    file.write_bytes(broken.text)
    return f"{PREFIX}{number}", file


def _contents(keys: Sequence[str]) -> Tuple[bool, bool]:
    """Whether objects of a use have RLEs, and whether they have keypoints."""
    return "polygons" not in keys, "keypoints" in keys


def _check_message(error: UserError, file: str) -> None:
    assert type(error) is UserError
    message = str(error)
    assert file in message and "Traceback" not in message
    message.encode("utf-8")  # a terminal can show it
    assert len(message) < 3000, message


def _check_records(records: List[dict], content: dict, annotations: List[dict]) -> None:
    """What Detectron2 loaded is what the json has: images, and of each its objects."""
    images = sorted(content["images"], key=lambda image: image["id"])
    assert [record["image_id"] for record in records] == [image["id"] for image in images]
    assert len(set(map(str, (image["id"] for image in images)))) == len(images)
    classes = sorted(category["id"] for category in content["categories"])
    assert all(math.isfinite(number) for number in classes)
    for record, image in zip(records, images):
        assert type(record["image_id"]) in (int, str) and type(record["height"]) is type(record["width"]) is int
        assert os.path.basename(record["file_name"]) == os.path.basename(image["file_name"])
        assert (record["height"], record["width"]) == (image["height"], image["width"])
        own = [entry for entry in annotations if entry["image_id"] == image["id"]]
        assert len(record["annotations"]) == len(own)
        for loaded, entry in zip(record["annotations"], own):
            assert loaded["category_id"] == classes.index(entry["category_id"])
            assert loaded.get("iscrowd") == entry.get("iscrowd") and type(loaded.get("iscrowd", 0)) is int
            box = np.asarray(entry["bbox"], dtype=np.float64)
            assert box.shape == (4,) and np.isfinite(box).all() and (box[2:] >= 0).all()
            np.testing.assert_array_equal(np.asarray(loaded["bbox"], dtype=np.float64), box)
    known = {image["id"] for image in images}
    assert all(entry["image_id"] in known for entry in annotations)


def _check_evaluation(name: str, records: List[dict], keys: Sequence[str]) -> int:
    """Detectron2's evaluator can read every box, mask and keypoint, and finds what it is shown.

    Returns:
        The number of tasks in which all objects were found.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(MetadataCatalog.get(name).json_file)
        objects = [entry for entry in truth.dataset["annotations"] if not entry["iscrowd"]]
        if not objects:
            return 0
        points = len(objects[0].get("keypoints") or []) // 3
        evaluator = COCOEvaluator(name, distributed=False, kpt_oks_sigmas=[0.05] * points)
        evaluator.reset()
        for record in records:
            own = [entry for entry in objects if entry["image_id"] == record["image_id"]]
            evaluator.process([record], [_perfect_outputs(record, own, truth, keys)])
        results = evaluator.evaluate()
    areas = {"bbox": [min(entry["bbox"][2:]) for entry in objects], "keypoints": [_visible(entry) for entry in objects]}
    areas["segmentation"] = [truth.annToMask(entry).sum() for entry in objects] if "segmentation" in keys else []
    found = 0
    for task in sorted(TASKS & {"bbox", "box_proposals", *keys}):
        result = results["segm" if task == "segmentation" else task]
        score = result["AR@100"] if task == "box_proposals" else result["AP"]
        assert math.isnan(score) or 0 <= score <= 100 + 1e-9
        # An empty box or mask overlaps nothing; an object of id 0 counts as not found. Text ids that are longer than a
        # letter are lists of ids to the evaluator of proposals.
        if min(areas["bbox" if task == "box_proposals" else task]) < 1 or any(entry["id"] == 0 for entry in objects):
            continue
        if task == "box_proposals" and any(isinstance(record["image_id"], str) for record in records):
            continue
        assert score > 99, (task, score)
        found += 1
    return found


def _perfect_outputs(record: dict, objects: List[dict], truth: COCO, keys: Sequence[str]) -> dict:
    size = record["height"], record["width"]
    boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float64).reshape(-1, 4)
    boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
    classes = sorted(truth.getCatIds())
    instances = Instances(size, pred_boxes=boxes, scores=torch.ones(len(objects)))
    instances.pred_classes = torch.tensor([classes.index(entry["category_id"]) for entry in objects], dtype=torch.int64)
    if "segmentation" in keys:
        masks = [truth.annToMask(entry) for entry in objects]
        instances.pred_masks = torch.from_numpy(np.array(masks, dtype=np.uint8)).reshape(-1, *size)
    if "keypoints" in keys:
        keypoints = torch.tensor([entry["keypoints"] for entry in objects], dtype=torch.float64)
        keypoints = keypoints.reshape(len(objects), -1, 3) if objects else torch.zeros(0, 1, 3)
        keypoints[:, :, :2] += 0.5  # Detectron2 counts from the pixel's corner, COCO from its centre
        instances.pred_keypoints = keypoints
    return {
        "instances": instances,
        "proposals": Instances(size, proposal_boxes=boxes, objectness_logits=instances.scores),
    }


def _visible(entry: dict) -> int:
    """The number of an object's keypoints that the evaluator compares."""
    return min(entry.get("num_keypoints") or 0, sum(visible > 0 for visible in (entry.get("keypoints") or [])[2::3]))


def _check_mapped(records: List[dict], mask_format: Optional[str], may_refuse: bool) -> None:
    """Training gets each object that is no crowd and has an area, its box cut at the image's border."""
    mapper = CheckedMapper(
        True,
        augmentations=[],
        image_format="BGR",
        use_instance_mask=mask_format is not None,
        instance_mask_format=mask_format or "polygon",
    )
    for record in records:
        image = _decoded(record["file_name"])
        fits = image is not None and image.shape[:2] == (record["height"], record["width"])
        fits &= os.path.basename(record["file_name"]) not in ("deep.png", "float.tif")
        try:
            mapped = mapper(record)
        except UserError as error:
            assert may_refuse and not fits and record["file_name"] in str(error)
            continue
        assert fits
        np.testing.assert_array_equal(mapped["image"].numpy().transpose(1, 2, 0)[:, :, ::-1], image)
        objects = [entry for entry in record["annotations"] if not entry.get("iscrowd")]
        boxes = np.array([_clipped(entry["bbox"], image.shape) for entry in objects]).reshape(-1, 4)
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 1e-5).all(axis=1)
        instances = mapped["instances"]
        if mask_format is not None:
            masks = [_mask(entry["segmentation"]) for entry in objects]
            # An object whose mask has no pixel is dropped, too.
            kept &= np.array([mask is None or mask.any() for mask in masks], dtype=bool)
            if len(instances) == kept.sum() and mask_format == "bitmask" and objects:
                for mapped_mask, mask in zip(instances.gt_masks.tensor.numpy(), itertools.compress(masks, kept)):
                    assert mask is None or np.array_equal(mapped_mask, mask)
        if mask_format is None or len(instances) == kept.sum():
            np.testing.assert_allclose(instances.gt_boxes.tensor.numpy(), boxes[kept], atol=0.05)
        assert len(instances) <= kept.sum()


def _check_nothing_is_made_up(content: dict, whole: dict) -> None:
    assert content["categories"] == whole["categories"]
    assert content["images"]
    for part in ("images", "annotations"):
        before = Counter(_text(entry) for entry in whole[part])
        for entry in content[part]:
            text = _text(entry)
            if text not in before and part == "annotations":  # it may have lost its mask
                same_id = [e for e in whole[part] if isinstance(e, dict) and e.get("id") == entry["id"]]
                assert any({k: v for k, v in e.items() if k != "segmentation"} == entry for e in same_id)
            else:
                before[text] -= 1
                assert before[text] >= 0


def _check_sound_entries_are_kept(content: dict, whole: dict, sound: dict) -> None:
    """An image that nothing was done to, and its objects, are there: only what is broken is left out."""
    if whole["categories"] != sound["categories"]:
        return
    kept_images = [image["id"] for image in content["images"]]
    kept = [entry["id"] for entry in content["annotations"]]
    for image in sound["images"]:
        claims = [e for e in whole["images"] if isinstance(e, dict) and e.get("id") == image["id"]]
        if not _is_same(claims, [image]):
            continue
        if 2 * sum(isinstance(e, dict) and type(e.get("id")) is int for e in whole["images"]) <= len(whole["images"]):
            continue  # ids of another type are the rule
        before = [e for e in sound["annotations"] if e["image_id"] == image["id"]]
        now = [e for e in whole["annotations"] if isinstance(e, dict) and e.get("image_id") == image["id"]]
        if not _is_same(now, before) or any(_is_repeated(e, whole["annotations"]) for e in before):
            continue
        assert image["id"] in kept_images
        assert all(entry["id"] in kept for entry in before)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|true|false|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?')


def _text(value: Any) -> str:
    """As json, with whole numbers in one way of writing: 64 is 64.0 and true is 1."""

    def plain(match: "re.Match[str]") -> str:
        token = match.group()
        if token in ("true", "false"):
            return str(int(token == "true"))
        if token[0] == '"' or not set(token) & set(".eE"):
            return token
        return str(int(float(token))) if math.isfinite(float(token)) and float(token) % 1 == 0 else token

    # On the text, because a value may be nested deeper than Python's functions can call themselves.
    return _TOKEN.sub(plain, json.dumps(value, sort_keys=True))


def _is_same(first: Any, second: Any) -> bool:
    """To Python True == 1."""
    return json.dumps(first) == json.dumps(second)


def _is_repeated(entry: dict, entries: list) -> bool:
    return sum(isinstance(e, dict) and e.get("id") == entry["id"] for e in entries) > 1


# ------------------------------------------------------------------ readings of our own
def _decoded(path: str) -> Optional[np.ndarray]:
    """(H, W, 3) of RGB, None where PIL cannot read it."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError):
        return None


def _clipped(box, shape) -> list:
    x, y, width, height = box
    limits = (shape[1], shape[0], shape[1], shape[0])
    return [min(max(value, 0), limit) for value, limit in zip((x, y, x + width, y + height), limits)]


def _mask(segmentation) -> Optional[np.ndarray]:
    """(H, W) of a plain RLE, None of another mask."""
    if not isinstance(segmentation, dict) or isinstance(segmentation["counts"], (str, bytes)):
        return None
    counts = segmentation["counts"]
    flat = np.repeat(np.arange(len(counts)) % 2, np.asarray(counts, dtype=np.int64))
    return flat.reshape(segmentation["size"], order="F").astype(bool)
