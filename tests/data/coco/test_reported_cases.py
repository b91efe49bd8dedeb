"""Sets in COCO's format that people reported, each derived from a sound one and used by the program."""

import copy
import json
import re
from pathlib import Path

import coco_data
import numpy as np
import programs
import pytest
import toy
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from mgd_det.cli import check_dataset, train_net, visualize_matching

SMALL = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "1"]
SMALL += ["DATALOADER.NUM_WORKERS", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.DEVICE", "cpu"]
KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "MODEL.MASK_ON", "False", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[16]"]
THREE = ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3", "TEST.KEYPOINT_OKS_SIGMAS", "[0.05, 0.05, 0.05]"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Paths of a sound set: json and image folder of each split."""
    flags = toy.write_scenes(tmp_path_factory.mktemp("scenes") / "toy", train=4, val=3)
    return {"train": (flags[1], flags[3]), "val": (flags[5], flags[7])}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return toy.save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth", toy.RCNN)


@pytest.fixture
def program(tmp_path, capfd):
    """Runs training in this process; returns (exit status, stdout, stderr)."""

    def run(base, flags, *opts):
        fixed = [*toy.plain_opts(base), *SMALL, "OUTPUT_DIR", str(tmp_path / "out")]
        status = programs.exit_status(train_net.main, "--config-file", base, *flags, *fixed, *opts)
        return (status, *capfd.readouterr())

    yield run
    coco_data.forget("test_reported_")


def derived(path, change, root):
    content = copy.deepcopy(json.loads(Path(path).read_text()))
    change(content)
    root.mkdir(exist_ok=True)
    (root / Path(path).name).write_text(json.dumps(content))
    return str(root / Path(path).name)


def flags_of(sets):
    return [x for s, (file, images) in sets.items() for x in (f"--{s}-json", file, f"--{s}-images", images)]


def names_of(sets, *opts):
    """Registers the sets without metadata, as a user's program does; overrides that name them."""
    for split, paths in sets.items():
        register_coco_instances(f"test_reported_{split}", {}, *paths)
    names = ["DATASETS.TRAIN", "('test_reported_train',)", "DATASETS.TEST", "('test_reported_val',)"]
    return [*names, "MODEL.ROI_HEADS.NUM_CLASSES", "10", *opts]


def check_error(outcome, said):
    status, _, err = outcome
    assert status == 1 and err.count("error: ") == 1 and "Traceback" not in err
    assert re.search(said, err, re.DOTALL), err


def float_sizes(content):
    for image in content["images"]:
        image["width"], image["height"] = float(image["width"]), float(image["height"])


def other_order(content):
    ids = sorted(category["id"] for category in content["categories"])
    swapped = dict(zip(ids, reversed(ids)))
    for category in content["categories"]:
        category["id"] = swapped[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = swapped[annotation["category_id"]]


def three_keypoints(content):
    for category in content["categories"]:
        category["keypoints"], category["skeleton"] = ["left", "middle", "right"], [[1, 2], [2, 3]]
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["keypoints"] = [value for k in (0.2, 0.5, 0.8) for value in (x + k * w, y + h / 2, 2)]
        annotation["num_keypoints"] = 3


@pytest.mark.slow
def test_sizes_such_as_64_0_are_evaluated_with_masks(sound, tmp_path, program):
    sets = {**sound, "val": (derived(sound["val"][0], float_sizes, tmp_path / "cases"), sound["val"][1])}
    status, out, err = program(toy.RCNN, flags_of(sets))
    assert status == 0, err
    assert "Evaluation results for segm" in out


def test_another_order_of_ids_is_refused_as_by_flags(sound, tmp_path, program):
    other = {**sound, "val": (derived(sound["val"][0], other_order, tmp_path / "cases"), sound["val"][1])}
    said = "has the classes .*'Ankle boot', .*but .* has .*'T-shirt"
    check_error(program(toy.RCNN, flags_of(other)), said)
    check_error(program(toy.RCNN, [], *names_of(other)), f"DATASETS.TEST test_reported_val {said}")
    assert not (tmp_path / "out" / "model_final.pth").exists()


@pytest.mark.slow
def test_a_keypoint_detector_trains_distils_and_is_scored(sound, teacher, tmp_path, program):
    sets = {split: (derived(file, three_keypoints, tmp_path / "cases"), im) for split, (file, im) in sound.items()}
    opts = [*KEYPOINTS, *toy.distilled_opts(teacher, toy.RCNN)]
    check_error(program(toy.RCNN, flags_of(sets), *opts), "coco_folder_train has 3 keypoints.*NUM_KEYPOINTS is 17")
    check_error(program(toy.RCNN, flags_of(sets), *opts, *THREE[:2]), "TEST.KEYPOINT_OKS_SIGMAS is empty.*give one")
    for flags, names in ((flags_of(sets), []), ([], names_of(sets))):
        status, out, err = program(toy.RCNN, flags, *names, *opts, *THREE)
        assert status == 0, err
        assert "Evaluation results for keypoints" in out and "loss_keypoint" in out and "loss_mgd_res5" in out
    found = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert found and all(len(detection["keypoints"]) == 9 for detection in found)


@pytest.mark.slow
def test_the_teacher_of_a_keypoint_detector_is_scored_by_the_same_sigmas(sound, tmp_path, program):
    sets = {split: (derived(file, three_keypoints, tmp_path / "cases"), im) for split, (file, im) in sound.items()}
    status, _, err = program(toy.RCNN, flags_of(sets), *KEYPOINTS, *THREE, *toy.NARROW_R50)
    assert status == 0, err
    opts = toy.distilled_opts(str(tmp_path / "out" / "model_final.pth"), toy.RCNN)
    teacher = [*toy.teacher_opts(toy.RCNN), *KEYPOINTS, *THREE[:2], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    opts += ["MODEL.MGD.TEACHER.OPTS", str(teacher)]
    status, out, err = program(toy.RCNN, ["--eval-teacher", *flags_of(sets)], *opts, *KEYPOINTS, *THREE)
    assert status == 0, err
    assert "Evaluation results for keypoints" in out


def test_deep_images_are_problems_of_checker_and_training(sound, tmp_path, program, capfd):
    folder = tmp_path / "deep"
    folder.mkdir()

    def deep(content):
        for image in content["images"]:
            grey = np.asarray(Image.open(Path(sound["train"][1]) / image["file_name"]).convert("L"), dtype=np.uint16)
            image["file_name"] = Path(image["file_name"]).stem + ".png"
            Image.fromarray(grey * 16).save(folder / image["file_name"])

    json_file = derived(sound["train"][0], deep, tmp_path / "cases")
    check_error(program(toy.RCNN, flags_of({**sound, "train": (json_file, str(folder))})), r"deep/[^']*\.png' .*I;16")
    assert check_dataset.main(["--json", json_file, "--images", str(folder)]) == 1
    said = capfd.readouterr().out
    assert re.search(r"breaks: .*deep/[^']*\.png' .*I;16", said) and "4 problems that break training" in said


@pytest.mark.slow
def test_the_matching_of_a_keypoint_detector_is_drawn(sound, teacher, tmp_path, capfd):
    json_file, images = derived(sound["train"][0], three_keypoints, tmp_path / "cases"), sound["train"][1]
    opts = [*toy.plain_opts(toy.RCNN), *toy.distilled_opts(teacher, toy.RCNN), *KEYPOINTS, *SMALL, *THREE]
    opts += ["DATASETS.COCO_FOLDER.TRAIN_JSON", json_file, "DATASETS.COCO_FOLDER.TRAIN_IMAGES", images]
    argv = ["--config-file", toy.RCNN, "--output-dir", str(tmp_path / "pictures"), "--batches", "1", "--channels", "1"]
    try:
        visualize_matching.main([*argv, *opts, "OUTPUT_DIR", str(tmp_path / "out")])
    finally:
        coco_data.forget("coco_folder_")
    assert (tmp_path / "pictures" / "matching.png").exists(), capfd.readouterr().err
