"""Objects that only the teacher finds."""

import json

import coco_data
import pytest
from coco_data import annotation
from detectron2.data.datasets import register_coco_instances
from matplotlib.image import imread

from mgd_det.visualization import misses
from mgd_det.visualization.misses import NoExamples, draw_misses

NAME = "test_misses"
BOX = [8, 10, 20, 12]


def detection(image, box=BOX, category=7, score=0.9):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


@pytest.fixture
def files(tmp_path):
    """Writes the detections of both; image 4 has two objects, image 5 a crowd."""
    content = coco_data.content(annotations=[annotation(i, image_id=i) for i in (1, 2, 3, 4)])
    content["annotations"] += [annotation(5, image_id=4, bbox=[40, 20, 10, 10]), annotation(6, image_id=5, iscrowd=1)]
    json_file, images = coco_data.write(tmp_path, content)
    register_coco_instances(NAME, {}, str(json_file), str(images))

    def write(student, teacher=None):
        paths = []
        for name, found in (("student", student), ("teacher", teacher)):
            paths.append(tmp_path / f"{name}.json" if found is not None else "")
            if found is not None:
                paths[-1].write_text(json.dumps(found))
        return [str(path) for path in paths]

    yield write
    coco_data.forget(NAME)


def test_images_with_the_most_such_objects_come_first(files, tmp_path):
    student = [
        detection(1),
        detection(2, score=0.2),  # below the threshold
        detection(3, category=20),  # of another class
        detection(4, box=[22, 20, 20, 12]),  # too far
    ]
    teacher = [detection(i) for i in (1, 2, 4)] + [detection(4, box=[40, 20, 10, 10]), detection(5)]
    student, teacher = files(student, teacher)
    lines = draw_misses(NAME, student, tmp_path / "out.png", teacher=teacher, number=3)
    assert [line.rpartition("/")[2] for line in lines] == ["4.png: plane, plane", "2.png: plane"]
    three_columns, two_rows = imread(tmp_path / "out.png").shape[1] // 300, imread(tmp_path / "out.png").shape[0] // 225
    assert (three_columns, two_rows) == (3, 2)
    assert len(draw_misses(NAME, student, tmp_path / "out.png", teacher=teacher, number=1)) == 1


def test_the_teacher_runs_only_where_the_student_misses_most(files, tmp_path):
    asked = []

    def run(records):
        asked.extend(record["image_id"] for record in records)
        return {4: [{"bbox": BOX, "category_id": 0, "score": 0.8}]}  # class 0 has the lowest id, 7

    (student, _) = files([detection(1)])
    (line,) = draw_misses(NAME, student, tmp_path / "out.png", run_teacher=run, number=1)
    assert line.endswith("4.png: plane") and asked == [4, 2, 3]


@pytest.mark.parametrize(
    "student, teacher, reason",
    [
        ([detection(i) for i in (1, 2, 3, 4)] + [detection(4, box=[40, 20, 10, 10])], [], "every object"),
        ([detection(1)], [detection(1)], "none of the objects"),
        ([], None, "--eval-teacher"),
        (None, [], "cannot be read"),
    ],
)
def test_nothing_to_show_has_a_reason(files, tmp_path, student, teacher, reason):
    student, teacher = files(student, teacher)
    with pytest.raises(NoExamples, match=reason):
        draw_misses(NAME, student, tmp_path / "out.png", teacher=teacher)
    assert not (tmp_path / "out.png").exists()


def test_boxes_of_a_detector(files):
    import torch
    from detectron2.structures import Boxes, Instances

    found = Instances((9, 9), pred_boxes=Boxes(torch.tensor([[1.0, 2, 5, 8]])), scores=torch.tensor([0.5]))
    found.pred_classes = torch.tensor([3])
    assert misses.detections_of(found) == [{"bbox": [1.0, 2.0, 4.0, 6.0], "category_id": 3, "score": 0.5}]
