"""Training and evaluating on data sets as people have them."""

import json
import math

import coco_data
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import toy
from coco_data import SIZE, annotation
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from mgd_det.data import check_dataset, register_coco_folder
from mgd_det.engine import Trainer

NAME = "test_own_data"
KEYS = ["area", "iscrowd", "segmentation"]


@pytest.fixture(autouse=True)
def catalog():
    yield
    coco_data.forget(NAME)


def register(root, content):
    json_file, images = coco_data.write(root, content)
    register_coco_folder(NAME, json_file, images)


def config(base, *opts):
    cfg = toy.plain_config(base, opts=["DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", f"('{NAME}',)", *opts])
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 2
    return cfg


def step(cfg, batch):
    """The losses of one training step, whose gradients are checked too."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(math.isfinite(loss) for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.slow
@pytest.mark.parametrize("base", [toy.RETINANET, toy.RCNN])
def test_images_without_objects(tmp_path, base):
    content = coco_data.content()
    for entry in content["annotations"][2:4]:
        entry["iscrowd"] = 1
    content["annotations"] = content["annotations"][:4]  # images 5 and 6: nothing; 3 and 4: a crowd
    register(tmp_path, content)
    ids = {}
    for drops in (True, False):
        loader = iter(Trainer.build_train_loader(config(base, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", drops)))
        batches = [next(loader) for _ in range(12)]
        ids[drops] = {entry["image_id"] for batch in batches for entry in batch}
    assert ids == {True: {1, 2}, False: {1, 2, 3, 4, 5, 6}}
    empty = [entry for batch in batches for entry in batch if len(entry["instances"]) == 0][:2]
    losses = step(config(base), empty)
    assert losses["loss_cls"] > 0
    assert losses["loss_box_reg"] == 0 and losses.get("loss_mask", 0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("base", [toy.RETINANET, toy.RCNN])
def test_what_coco_has_trains_a_step(tmp_path, base):
    """Keypoints, crowds, boxes that stick out or are empty, a bad polygon among good ones, foreign keys."""
    content = coco_data.content(images=3)
    crowd = mask_util.encode(np.asfortranarray(np.eye(*SIZE, dtype=np.uint8)))
    content["annotations"] = [
        annotation(1, keypoints=[10, 12, 2] * 17, num_keypoints=17, score=1.0),
        annotation(2, bbox=[50, 40, 30, 30], segmentation=[[50, 40, 80, 40, 80, 70]]),
        annotation(3, image_id=2, segmentation=[[8, 10, 28, 10, 28, 22], [1, 2]]),
        annotation(4, image_id=2, bbox=[29.65, 38.33, 1.03, 0.0], segmentation=[[29.65, 38.33] * 4], area=0.0),
        annotation(5, image_id=2, iscrowd=1, segmentation={"size": list(SIZE), "counts": crowd["counts"].decode()}),
        annotation(6, image_id=2, iscrowd=1, segmentation={"size": list(SIZE), "counts": [100, 2972]}),
    ]
    content["info"] = content["licenses"] = [{"x": 1}]
    register(tmp_path, content)
    check_dataset(NAME, [*KEYS, "polygons"])
    cfg = config(base, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", True, "INPUT.MASK_FORMAT", "polygon")
    batch = next(iter(Trainer.build_train_loader(cfg)))
    losses = step(cfg, batch)
    assert {entry["image_id"] for entry in batch} == {1, 2}
    assert sum(len(entry["instances"]) for entry in batch) == 3  # without the crowds and the empty box
    assert losses["loss_cls"] > 0 and ("loss_mask" in losses) == (base == toy.RCNN)


def test_boxes_alone_train_and_need_no_segmentation(tmp_path):
    content = coco_data.content()
    for entry in content["annotations"]:
        del entry["segmentation"]
    register(tmp_path, content)
    check_dataset(NAME, ["area", "iscrowd"])
    cfg = config(toy.RCNN, "MODEL.MASK_ON", False)
    assert "loss_mask" not in step(cfg, next(iter(Trainer.build_train_loader(cfg))))


class Oracle(torch.nn.Module):
    """A detector that finds what a function of the image's record says, as boxes and class indices."""

    def __init__(self, answer):
        super().__init__()
        self.records = {record["image_id"]: record for record in DatasetCatalog.get(NAME)}
        self.answer = answer

    def forward(self, batch):
        outputs = []
        for entry in batch:
            found = [self.answer(a) for a in self.records[entry["image_id"]]["annotations"]]
            instances = Instances((entry["height"], entry["width"]))
            boxes = torch.tensor([box for box, _ in found], dtype=torch.float32).reshape(-1, 4)
            instances.pred_boxes = Boxes(boxes)
            instances.pred_boxes.tensor[:, 2:] += boxes[:, :2]
            instances.pred_classes = torch.tensor([label for _, label in found], dtype=torch.int64)
            instances.scores = torch.ones(len(found))
            outputs.append({"instances": instances})
        return outputs


def ap_of(answer, tmp_path):
    cfg = config(toy.RETINANET)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    results = Trainer.test(cfg, Oracle(answer))["bbox"]
    return {key[3:]: round(value, 3) for key, value in results.items() if key.startswith("AP-")}


def test_ids_that_are_neither_in_order_nor_contiguous_are_evaluated_by_name(tmp_path):
    """Categories 91, 7 and 20, in this order in the json: each counts under its own name."""
    register(tmp_path, coco_data.content())
    assert DatasetCatalog.get(NAME) and MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id == {
        7: 0,
        20: 1,
        91: 2,
    }
    assert ap_of(lambda a: (a["bbox"], a["category_id"]), tmp_path) == {"plane": 100, "car": 100, "ship": 100}
    # Classes 0 (plane, 7) and 2 (ship, 91) exchanged: only the car is right.
    assert ap_of(lambda a: (a["bbox"], 2 - a["category_id"]), tmp_path) == {"plane": 0, "car": 100, "ship": 0}
    results = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert {result["category_id"] for result in results} == {7, 20, 91}


def test_an_object_of_id_0_counts_as_not_found(tmp_path):
    """Why annotation id 0 is noted."""
    content = coco_data.content()
    register(tmp_path / "a", content)
    assert set(ap_of(lambda a: (a["bbox"], a["category_id"]), tmp_path).values()) == {100}
    coco_data.forget(NAME)
    first = content["annotations"][0]
    first["id"] = 0
    register(tmp_path / "b", content)
    assert ap_of(lambda a: (a["bbox"], a["category_id"]), tmp_path)[coco_data.CATEGORIES[first["category_id"]]] < 100
