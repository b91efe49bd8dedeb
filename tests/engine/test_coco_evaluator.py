"""The fast computation of AP: every number of pycocotools, through Detectron2's evaluator."""

import json
import logging
import multiprocessing
import sys

import numpy as np
import pytest
import torch
from coco_data import forget, plain_rle, rle
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from mgd_det.engine import coco_evaluator
from mgd_det.engine.coco_evaluator import FastCOCOEvaluator

NAME = "test_coco_evaluator"
SIZE = (96, 128)
CATEGORIES = {7: "few", 91: "many", 3: "small", 40: "never found", 12: "not there"}


@pytest.fixture(autouse=True)
def name():
    coco_evaluator._has_hotcoco.cache_clear()
    yield NAME
    coco_evaluator._has_hotcoco.cache_clear()
    forget(NAME)


def ellipse(x, y, w, h):
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 < 1


def segmentation(kind, mask, x, y, w, h):
    if kind == "polygon":
        return [[x, y, x + w, y, x + w / 2, y + h], [x, y + h / 2, x + w, y + h, x, y + h]]
    return rle(mask) if kind == "rle" else plain_rle(mask)


def write(path, images=8, ids=lambda number: number):
    """Writes a set with crowds, all areas, masks of every kind, keypoints, and a class and an image of no object."""
    rng = np.random.default_rng(3)
    annotations = []
    for image in range(1, images):
        for _ in range(rng.integers(1, 9)):
            w, h = rng.uniform(4, 110), rng.uniform(4, 80)
            x, y = rng.uniform(0, SIZE[1] - w), rng.uniform(0, SIZE[0] - h)
            category = [7, 91, 91, 91, 3, 40][rng.integers(6)]
            crowd = int(rng.random() < 0.15)
            points = rng.uniform([x, y], [x + w, y + h], (3, 2)).round()
            seen = rng.integers(0, 3, (3, 1))
            kind = "plain" if crowd else ["polygon", "rle"][rng.integers(2)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": ids(image),
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    # As in COCO, not the area of the box.
                    "area": 2 * w * h,
                    "iscrowd": crowd,
                    "segmentation": segmentation(kind, ellipse(x, y, w, h), x, y, w, h),
                    "keypoints": np.concatenate([points, seen], axis=1).flatten().tolist(),
                    "num_keypoints": int((seen > 0).sum()),
                }
            )
    content = {
        "images": [{"id": ids(i), "file_name": f"{i}.png", "height": 96, "width": 128} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }
    path.write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(path), str(path.parent))
    return content


def detections(content, number=106, masks=True, keypoints=True):
    """Yields Detectron2's inputs and outputs: objects found about right, some of another class, many equal scores."""
    rng = np.random.default_rng(5)
    classes = sorted(CATEGORIES)
    DatasetCatalog.get(NAME)
    for image in content["images"][:-2]:  # on two images nothing is found
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        shown = [own[rng.integers(len(own))] for _ in range(number if own else 0)]
        boxes = np.array([a["bbox"] for a in shown]).reshape(-1, 4) + rng.normal(0, 4, (len(shown), 4))
        boxes[:, 2:] = boxes[:, 2:].clip(1)
        labels = [classes.index(a["category_id"]) if rng.random() < 0.8 else 2 for a in shown]
        labels = [2 if classes[label] == 40 else label for label in labels]
        found = Instances(SIZE, scores=torch.tensor(rng.integers(1, 20, len(shown)) / 20))
        found.pred_boxes = Boxes(torch.tensor(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)))
        found.pred_classes = torch.tensor(labels, dtype=torch.int64)
        if masks:
            found.pred_masks = torch.tensor(np.array([ellipse(*box) for box in boxes])).reshape(-1, *SIZE)
        if keypoints:
            points = np.array([a["keypoints"] for a in shown], dtype=float).reshape(-1, 3, 3)
            points[:, :, :2] += rng.normal(0, 3, (len(shown), 3, 2))
            found.pred_keypoints = torch.tensor(points)
        yield {"image_id": image["id"]}, {"instances": found}


def all_scores(kind, content, img_ids=None, tasks=None, found=None, **options):
    """The summaries of each task with all numbers of pycocotools, and Detectron2's scores, per class too."""
    summaries = {}

    class Recording(kind):
        def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
            if coco_eval is not None:
                summaries[iou_type] = np.array(coco_eval.stats)
            return super()._derive_coco_results(coco_eval, iou_type, class_names)

    evaluator = Recording(NAME, tasks=tasks, distributed=False, **options)
    evaluator.reset()
    for record, output in detections(content) if found is None else found:
        evaluator.process([record], [output])
    return summaries, evaluator.evaluate(img_ids=img_ids)


def assert_same(fast, slow):
    assert fast[0].keys() == slow[0].keys() and fast[1].keys() == slow[1].keys()
    for task, stats in slow[0].items():
        assert len(stats) == (10 if task == "keypoints" else 12)
        assert np.abs(fast[0][task] - stats).max() < 1e-9, task
        assert fast[1][task].keys() == slow[1][task].keys()
        for key, value in slow[1][task].items():
            assert fast[1][task][key] == pytest.approx(value, abs=1e-9, nan_ok=True), (task, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"max_dets_per_image": 104}, {"img_ids": [2, 3, 5]}, {"kpt_oks_sigmas": [0.2, 0.05, 0.1]}],
    ids=str,
)
def test_all_numbers_are_those_of_pycocotools(tmp_path, options):
    pytest.importorskip("hotcoco")
    content = write(tmp_path / "set.json")
    options = {"kpt_oks_sigmas": [0.1, 0.1, 0.1], **options}
    fast, slow = (all_scores(kind, content, **options) for kind in (FastCOCOEvaluator, COCOEvaluator))
    assert_same(fast, slow)
    # The data asks something of every number: none is 0, 1 or absent; the class that is not there has no AP.
    assert set(slow[0]) == {"bbox", "segm", "keypoints"}
    if "img_ids" not in options:
        assert all(((0 < stats) & (stats < 1)).all() for stats in slow[0].values())
    assert np.isnan(fast[1]["bbox"]["AP-not there"]) and fast[1]["segm"]["AP-never found"] == 0
    assert 0 < fast[1]["segm"]["AP-few"] != fast[1]["bbox"]["AP-few"]


def test_hotcoco_computes_unless_the_key_is_off(tmp_path, monkeypatch):
    hotcoco = pytest.importorskip("hotcoco")
    content = write(tmp_path / "set.json", images=4)
    used = []
    original = hotcoco.COCOeval
    monkeypatch.setattr(hotcoco, "COCOeval", lambda *arguments: used.append(arguments[2]) or original(*arguments))
    for on, tasks in ((True, ["bbox"]), (False, [])):
        used.clear()
        all_scores(FastCOCOEvaluator, content, tasks=("bbox",), use_fast_impl=on)
        assert used == tasks


@pytest.mark.parametrize("version", [None, "1.2.9"])
def test_without_hotcoco_pycocotools_computes_and_one_line_says_so(tmp_path, monkeypatch, caplog, version):
    content = write(tmp_path / "set.json", images=4)
    if version is None:
        monkeypatch.setitem(sys.modules, "hotcoco", None)
    else:
        pytest.importorskip("hotcoco")
        monkeypatch.setattr(coco_evaluator.importlib.metadata, "version", lambda package: version)
    with caplog.at_level(logging.INFO):
        fast = [all_scores(FastCOCOEvaluator, content, tasks=("bbox",)) for _ in range(2)][1]
    lines = [record.getMessage() for record in caplog.records if "pycocotools" in record.getMessage()]
    assert len(lines) == 1 and "hotcoco" in lines[0] and (version or "pip install") in lines[0]
    assert "Fast COCO eval is not built" not in caplog.text
    assert_same(fast, all_scores(COCOEvaluator, content, tasks=("bbox",)))


def test_ids_that_hotcoco_cannot_read_go_to_pycocotools(tmp_path, caplog):
    pytest.importorskip("hotcoco")
    content = write(tmp_path / "set.json", images=4, ids=lambda number: f"image {number}")
    fast = all_scores(FastCOCOEvaluator, content, tasks=("bbox",))
    assert "pycocotools" in caplog.text and "hotcoco does not take" in caplog.text
    assert_same(fast, all_scores(COCOEvaluator, content, tasks=("bbox",)))
    assert fast[0]["bbox"][0] > 0


def test_annotations_of_id_0_count_as_in_pycocotools(tmp_path):
    """An object of id 0 is never found there."""
    pytest.importorskip("hotcoco")
    content = write(tmp_path / "set.json", images=3)
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    (tmp_path / "set.json").write_text(json.dumps(content))
    fast, slow = (all_scores(kind, content, tasks=("bbox",)) for kind in (FastCOCOEvaluator, COCOEvaluator))
    assert_same(fast, slow)


def test_no_detection_at_all(tmp_path):
    pytest.importorskip("hotcoco")
    content = write(tmp_path / "set.json", images=3)
    found = list(detections(content, number=0))
    _, scores = all_scores(FastCOCOEvaluator, content, tasks=("bbox",), found=found)
    assert np.isnan(scores["bbox"]["AP"])


def test_a_process_that_was_forked_after_an_evaluation_does_not_hang(tmp_path):
    pytest.importorskip("hotcoco")
    content = write(tmp_path / "set.json", images=4)
    fast = all_scores(FastCOCOEvaluator, content, tasks=("bbox",))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    run = lambda: sender.send(all_scores(FastCOCOEvaluator, content, tasks=("bbox",)))  # noqa: E731
    process = context.Process(target=run)
    process.start()
    try:
        assert receiver.poll(60), "it hangs"
        assert_same(receiver.recv(), fast)
    finally:
        process.kill()
        process.join()
