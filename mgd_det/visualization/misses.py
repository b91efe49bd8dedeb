"""Pictures of objects that the student misses and the teacher finds.

Detections are in Detectron2's terms: contiguous class indices, and boxes [x, y, width, height] in pixels of the image.
"""

import json
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from mgd_det.visualization.figures import Output
from mgd_det.visualization.predictions import draw_predictions

_SCORE, _IOU = 0.3, 0.5  # of a detection that counts: its lowest score, and its lowest overlap with the object
_TRIED = 4  # images on which the teacher is run, for each picture

Detection = Dict[str, Any]
Record = Dict[str, Any]


class NoExamples(Exception):
    """There is nothing to show. The message says why, as a whole sentence."""


def draw_misses(
    dataset: str,
    student: str,
    output: Output,
    *,
    teacher: str = "",
    run_teacher: Optional[Callable[[Sequence[Record]], Mapping[Any, List[Detection]]]] = None,
    number: int = 4,
) -> List[str]:
    """Draw the images with the most objects that only the teacher finds: ground truth, teacher, student.

    Args:
        dataset: a registered set with annotations.
        student: coco_instances_results.json of the student's evaluation on it.
        output: PNG to write, a path or a binary file.
        teacher: the same file of the teacher, or "".
        run_teacher: returns the teacher's detections by image id, instead of the file. It is called with the images
            on which the student misses most, and may leave some out.
        number: images to draw, > 0.

    Returns:
        One line for each image: its file, and the objects that only the teacher finds.

    Raises:
        NoExamples: a file is missing, or there is no such object.
    """
    metadata = MetadataCatalog.get(dataset)
    records = DatasetCatalog.get(dataset)
    of_student = _read(student, metadata)
    missed = {r["image_id"]: _missed(r, of_student.get(r["image_id"], [])) for r in records}
    worst = sorted((r for r in records if missed[r["image_id"]]), key=lambda r: -len(missed[r["image_id"]]))
    if not worst:
        raise NoExamples("The student finds every object.")
    if teacher:
        of_teacher: Mapping[Any, List[Detection]] = _read(teacher, metadata)
    elif run_teacher is not None:
        worst = worst[: number * _TRIED]
        of_teacher = run_teacher(worst)
    else:
        raise NoExamples("The teacher's detections are not known: --eval-teacher writes them.")
    only_teacher = {}
    for record in worst:
        found = of_teacher.get(record["image_id"], [])
        objects = [a for a in missed[record["image_id"]] if _is_found(a, found)]
        if objects:
            only_teacher[record["image_id"]] = objects
    shown = sorted((r for r in worst if r["image_id"] in only_teacher), key=lambda r: -len(only_teacher[r["image_id"]]))
    shown = shown[:number]
    if not shown:
        raise NoExamples(f"The teacher finds none of the objects that the student misses on {len(worst)} images.")
    names = metadata.get("thing_classes")
    draw_predictions(
        {
            "ground truth": [r["annotations"] for r in shown],
            "teacher": [_instances(r, of_teacher.get(r["image_id"], [])) for r in shown],
            "student": [_instances(r, of_student.get(r["image_id"], [])) for r in shown],
        },
        [read_image(r["file_name"], "RGB") for r in shown],
        names,
        output,
        score_threshold=_SCORE,
        tile_size=300,
    )
    return [
        f"{r['file_name']}: " + ", ".join(names[a["category_id"]] for a in only_teacher[r["image_id"]]) for r in shown
    ]


def detections_of(instances: Instances) -> List[Detection]:
    """Return the boxes of a detector's output on one image."""
    boxes = BoxMode.convert(instances.pred_boxes.tensor.cpu(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    labels, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    return [{"bbox": b, "category_id": c, "score": s} for b, c, s in zip(boxes, labels, scores)]


def _read(path: str, metadata: Any) -> Dict[Any, List[Detection]]:
    """Read the detections of an evaluation by image id."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as e:
        raise NoExamples(f"The detections cannot be read: {e}") from e
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    by_image: Dict[Any, List[Detection]] = {}
    for entry in content:
        if entry["score"] >= _SCORE:
            label = entry["category_id"]
            entry = {**entry, "category_id": contiguous[label] if contiguous else label}
            by_image.setdefault(entry["image_id"], []).append(entry)
    return by_image


def _missed(record: Record, detections: Sequence[Detection]) -> List[Dict[str, Any]]:
    objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd")]
    return [a for a in objects if not _is_found(a, detections)]


def _is_found(annotation: Dict[str, Any], detections: Sequence[Detection]) -> bool:
    same = [d["bbox"] for d in detections if d["category_id"] == annotation["category_id"] and d["score"] >= _SCORE]
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYWH_ABS)
    return bool(same) and mask_util.iou(np.array(same, float), np.array([box], float), [0]).max() >= _IOU


def _instances(record: Record, detections: Sequence[Detection]) -> Instances:
    boxes = np.array([d["bbox"] for d in detections], dtype=np.float32).reshape(-1, 4)
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.pred_classes = np.array([d["category_id"] for d in detections], dtype=np.int64)
    instances.scores = np.array([d["score"] for d in detections], dtype=np.float32)
    if detections and all("segmentation" in d for d in detections):
        instances.pred_masks = [d["segmentation"] for d in detections]
    return instances
