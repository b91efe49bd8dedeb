"""Broken data sets are refused by one message of ours, or what is loaded of them is right."""

import contextlib
import io
import itertools
import json
import logging
import math
import os
from collections import Counter
from typing import Any, List, Optional

import coco_data
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from fuzz.budget import examples
from fuzz.coco_mutations import BrokenSet, broken_sets, sound_content, write_images
from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mgd_det.data import CheckedMapper, check_dataset, register_coco_folder, without_broken_entries
from mgd_det.data.coco.clean import register_without_broken
from mgd_det.errors import UserError

PREFIX = "fuzzed_"
USES = {  # annotation_keys of check_dataset, and the format of masks
    "boxes": ((), None),
    "evaluated boxes": (("area", "iscrowd"), None),
    "polygons": (("segmentation", "polygons"), "polygon"),
    "evaluated masks": (("area", "iscrowd", "segmentation"), "bitmask"),
}
_numbers = itertools.count()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    write_images(root)
    return root


@pytest.fixture(autouse=True)
def silence():
    """Detectron2 warns of each set anew."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("use", list(USES))
@examples(ci=75, nightly=1500)
@given(data=st.data())
def test_refused_or_right(root, use, data):
    keys, mask_format = USES[use]
    broken = data.draw(broken_sets(rles=mask_format != "polygon"))
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
            _check_evaluation(file, content["annotations"], masks=mask_format is not None)
        _check_mapped(records, mask_format, may_refuse=True)
    finally:
        coco_data.forget(PREFIX)
        file.unlink()


@pytest.mark.parametrize("use", list(USES))
@examples(ci=40, nightly=800)
@given(data=st.data())
def test_skipped_is_right(root, use, data):
    keys, mask_format = USES[use]
    broken = data.draw(broken_sets(rles=mask_format != "polygon"))
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
        _check_sound_entries_are_kept(content, whole, sound_content(rles=mask_format != "polygon"))
        records = DatasetCatalog.get(name)
        _check_records(records, content, content["annotations"])
        if "area" in keys:
            _check_evaluation(file_read, content["annotations"], masks=mask_format is not None)
        _check_mapped(records, mask_format, may_refuse=False)
    finally:
        coco_data.forget(PREFIX)
        file.unlink()


def test_the_sound_set_is_taken_whole(root):
    """What the tests above would let pass if everything were refused."""
    for keys, mask_format in USES.values():
        content = sound_content(rles=mask_format != "polygon")
        name, file = _written(root, BrokenSet(json.dumps(content).encode(), []))
        register_coco_folder(name, file, root / "images")
        check_dataset(name, keys)
        records = DatasetCatalog.get(name)
        assert sum(len(record["annotations"]) for record in records) == 6
        _check_records(records, content, content["annotations"])
        _check_evaluation(file, content["annotations"], masks=True)
        _check_mapped(records, mask_format, may_refuse=False)
        assert without_broken_entries(name, str(root), keys, decode=True).name == ""
        coco_data.forget(PREFIX)


# ------------------------------------------------------------------ what is asked of the outcome
def _written(root, broken: BrokenSet):
    number = next(_numbers)
    file = root / f"{number}.json"
    file.write_bytes(broken.text)
    return f"{PREFIX}{number}", file


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
        assert os.path.basename(record["file_name"]) == os.path.basename(image["file_name"])
        assert (record["height"], record["width"]) == (image["height"], image["width"])
        own = [entry for entry in annotations if entry["image_id"] == image["id"]]
        assert len(record["annotations"]) == len(own)
        for loaded, entry in zip(record["annotations"], own):
            assert loaded["category_id"] == classes.index(entry["category_id"])
            assert loaded.get("iscrowd") == entry.get("iscrowd")
            box = np.asarray(entry["bbox"], dtype=np.float64)
            assert box.shape == (4,) and np.isfinite(box).all() and (box[2:] >= 0).all()
            np.testing.assert_array_equal(np.asarray(loaded["bbox"], dtype=np.float64), box)
    known = {image["id"] for image in images}
    assert all(entry["image_id"] in known for entry in annotations)


def _check_evaluation(file, annotations: List[dict], masks: bool) -> None:
    """COCO's evaluator can read every box and mask, and counts every object that is no crowd."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        objects = [entry for entry in annotations if not entry["iscrowd"]]
        found = [{key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0} for entry in objects]
        if not found:
            return
        for kind in ("bbox", "segm") if masks else ("bbox",):
            if kind == "segm":
                for detection, entry in zip(found, objects):
                    detection["segmentation"] = truth.annToRLE(entry)
                    detection.pop("bbox", None)
            evaluator = COCOeval(truth, truth.loadRes(found), kind)
            evaluator.evaluate()
            of_any_area = [result for result in evaluator.evalImgs if result and result["aRng"] == [0, 1e10]]
            ignored = np.concatenate([result["gtIgnore"] for result in of_any_area])
            assert (ignored == 0).sum() == len(objects)


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
        before = Counter(json.dumps(entry, sort_keys=True) for entry in whole[part])
        for entry in content[part]:
            text = json.dumps(entry, sort_keys=True)
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
        claims = [e for e in whole["images"] if isinstance(e, dict) and _claims(e, image, ("id", "file_name"))]
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


def _is_same(first: Any, second: Any) -> bool:
    """To Python True == 1."""
    return json.dumps(first) == json.dumps(second)


def _claims(entry: dict, image: dict, keys) -> bool:
    return any(entry.get(key) == image[key] for key in keys)


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
