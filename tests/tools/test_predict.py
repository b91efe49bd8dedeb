"""tools/predict.py as a user runs it, against Detectron2's own predictor and COCO's evaluation."""

import json
import shutil
from pathlib import Path

import coco_data
import numpy as np
import programs
import pytest
import torch
import toy
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mgd_det.cli.predict import main
from mgd_det.cli.yaml_setup import read_config, save_student_config
from mgd_det.config import without_distillation
from mgd_det.data import register_coco_folder
from mgd_det.data.categories import save_categories
from mgd_det.engine.predictor import load_predictor
from mgd_det.errors import UserError

NAME = "test_predict_tool"
OPTS = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.NUM_CLASSES", "3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training on coco_data's three classes, with weights that find something everywhere."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    json_file, images = coco_data.write(folder.parent / "data", coco_data.content())
    cfg = toy.distilled_config("nowhere.pth", opts=[*OPTS, "OUTPUT_DIR", str(folder)])
    folder.mkdir()
    torch.manual_seed(1)
    torch.save({"model": build_model(without_distillation(cfg)).state_dict()}, folder / "model_final.pth")
    save_student_config(cfg)
    register_coco_folder(NAME, json_file, images)
    save_categories([NAME], str(folder))
    yield folder
    coco_data.forget(NAME)


@pytest.fixture
def images(trained):
    return trained.parent / "data" / "images"


@pytest.fixture
def program(capsys):
    """Runs it in this process; returns (exit status, stdout, stderr)."""

    return lambda *argv: (programs.exit_status(main, *argv), *capsys.readouterr())


def predictions(folder):
    return json.loads((folder / "predictions.json").read_text())


@pytest.mark.slow
def test_the_objects_are_those_of_detectron2s_predictor(program, trained, images, tmp_path, monkeypatch):
    moved = tmp_path / "moved"  # another place, another current folder
    shutil.copytree(trained, moved)
    monkeypatch.chdir(tmp_path)
    status, out, err = program(
        images, "--model", "moved", "--output-dir", "out", "--score-threshold", "0", "--max-images", 2
    )
    assert status == 0, err
    found = predictions(tmp_path / "out")
    assert [(i["id"], i["file_name"]) for i in found["images"]] == [(n, f"{n}.png") for n in (1, 2)]
    assert all((i["height"], i["width"]) == coco_data.SIZE for i in found["images"])
    assert {c["id"]: c["name"] for c in found["categories"]} == coco_data.CATEGORIES

    cfg = read_config(str(trained / "student.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    reference = DefaultPredictor(cfg)
    ids = sorted(coco_data.CATEGORIES)
    for image in found["images"]:
        expected = reference(read_image(str(images / image["file_name"]), "BGR"))["instances"]
        entries = [a for a in found["annotations"] if a["image_id"] == image["id"]]
        assert len(entries) == len(expected) > 0
        boxes = torch.tensor([a["bbox"] for a in entries])
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor)
        assert [a["category_id"] for a in entries] == [ids[i] for i in expected.pred_classes]
        assert [a["score"] for a in entries] == pytest.approx(expected.scores.tolist())
    assert len({a["id"] for a in found["annotations"]}) == len(found["annotations"])
    pictures = sorted((tmp_path / "out" / "pictures").iterdir())
    assert [path.name for path in pictures] == ["1.png", "2.png"]
    drawn, original = (Image.open(path) for path in (pictures[0], images / "1.png"))
    assert drawn.size == (640, 480)  # ten times the image
    assert (np.asarray(drawn) != np.asarray(original.resize(drawn.size))).any()
    assert str(Path("out") / "predictions.json") in out


@pytest.mark.slow
def test_the_ids_of_a_json_make_results_that_coco_evaluates(program, trained, images, tmp_path):
    json_file = tmp_path / "truth.json"
    content = coco_data.content()
    for image in content["images"]:
        image["id"] += 100
    for annotation in content["annotations"]:
        annotation["image_id"] += 100
    # Where the detector finds its best object there is one.
    program(images, "--model", trained, "--output-dir", tmp_path / "first", "--no-pictures", "--score-threshold", "0")
    best = {}
    for entry in predictions(tmp_path / "first")["annotations"]:
        best.setdefault(entry["image_id"] + 100, entry)
    content["annotations"] = [
        coco_data.annotation(n, image_id=i, category_id=e["category_id"], bbox=e["bbox"], area=e["area"])
        for n, (i, e) in enumerate(sorted(best.items()), start=1)
    ]
    json_file.write_text(json.dumps(content))
    argv = [images, "--model", trained, "--annotations", json_file, "--score-threshold", "0", "--no-pictures"]
    status, _, err = program(*argv, "--output-dir", tmp_path / "out")
    assert status == 0, err
    found = predictions(tmp_path / "out")
    assert [image["id"] for image in found["images"]] == [101, 102, 103, 104, 105, 106]
    assert not (tmp_path / "out" / "pictures").exists()
    truth = COCO(str(json_file))
    evaluation = COCOeval(truth, truth.loadRes(found["annotations"]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[8] == pytest.approx(1)  # recall

    content["categories"][0]["name"] = "boat"
    json_file.write_text(json.dumps(content))
    status, _, err = program(*argv, "--output-dir", tmp_path / "out")
    assert status == 1 and "'boat'" in err and "'ship'" in err
    del content["images"][0]
    json_file.write_text(json.dumps({**coco_data.content(), "images": content["images"]}))
    status, _, err = program(*argv, "--output-dir", tmp_path / "out")
    assert status == 1 and "--annotations" in err and "1.png" in err


def test_unreadable_images_are_left_out(program, trained, images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    coco_data.truncate(folder / "2.png")
    (folder / "3.png").write_bytes(b"")
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(folder / "4.png")
    (folder / "notes.txt").write_text("no image")
    status, out, err = program(folder, "--model", trained, "--output-dir", tmp_path / "out", "--max-images", 5)
    assert status == 1 and "3 of 5 images" in err
    for name in ("2.png", "3.png", "4.png"):
        assert sum(str(folder / name) in line for line in err.splitlines()) == 1
    assert [(i["id"], i["file_name"]) for i in predictions(tmp_path / "out")["images"]] == [(1, "1.png"), (5, "5.png")]


@pytest.mark.slow
def test_scores_below_the_threshold_are_left_out(program, trained, images, tmp_path):
    argv = [images / "1.png", "--model", trained, "--no-pictures"]
    program(*argv, "--output-dir", tmp_path / "all", "--score-threshold", "0")
    scores = sorted(a["score"] for a in predictions(tmp_path / "all")["annotations"])
    middle = scores[len(scores) // 2]
    program(*argv, "--output-dir", tmp_path / "half", "--score-threshold", middle - 1e-9)
    kept = sorted(a["score"] for a in predictions(tmp_path / "half")["annotations"])
    assert kept == [score for score in scores if score >= middle] and len(kept) < len(scores)
    with pytest.raises(SystemExit) as end:
        main(["x.png", "--model", "m", "--output-dir", "o", "--score-threshold", "1.5"])
    assert end.value.code == 2


@pytest.mark.slow
def test_folders_of_folders(program, trained, images, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        shutil.copy(images / "1.png", tmp_path / "images" / name / "1.png")
    argv = ["--model", trained, "--output-dir", tmp_path / "out"]
    status, _, err = program(tmp_path / "images", *argv)
    assert status == 1 and "--recursive" in err
    assert program(tmp_path / "images", *argv, "--recursive")[0] == 0
    assert [i["file_name"] for i in predictions(tmp_path / "out")["images"]] == ["a/1.png", "b/1.png"]
    assert (tmp_path / "out" / "pictures" / "b" / "1.png").exists()
    # Two folders with an image of the same name do not share a picture.
    assert program(tmp_path / "images" / "a", tmp_path / "images" / "b", *argv)[0] == 0
    names = [i["file_name"] for i in predictions(tmp_path / "out")["images"]]
    assert len(set(names)) == 2 and all(name.endswith("1.png") for name in names)


@pytest.mark.parametrize(
    "change, texts",
    [
        (lambda folder: (folder / "model_final.pth").unlink(), ["--model", "model_final.pth"]),
        (lambda folder: (folder / "student.yaml").unlink(), ["--model", "student.yaml", "config.yaml"]),
    ],
)
def test_an_unfinished_folder(trained, tmp_path, change, texts):
    shutil.copytree(trained, tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(UserError) as error:
        load_predictor(str(tmp_path / "run"))
    assert all(text in str(error.value) for text in [*texts, str(tmp_path / "run")])


def test_models_that_cannot_be_used(trained, tmp_path):
    with pytest.raises(UserError, match="m.onnx does not exist"):
        load_predictor("m.onnx")
    with pytest.raises(UserError, match="MODEL.WEIGHTS"):
        load_predictor(str(trained / "student.yaml"), ["MODEL.WEIGHTS", ""])
    with pytest.raises(UserError, match="head.cls_score"):  # another number of classes
        load_predictor(str(trained), ["MODEL.RETINANET.NUM_CLASSES", "5"])
    with pytest.raises(UserError, match="--model 'nowhere.yaml'"):
        load_predictor("nowhere.yaml")


def test_classes_without_names_have_numbers(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "categories.json").unlink()
    expected = [{"id": n, "name": f"class {n}"} for n in (1, 2, 3)]
    assert load_predictor(str(tmp_path / "run")).categories == expected
    (tmp_path / "run" / "categories.json").write_text("[3]")
    with pytest.raises(UserError, match="categories.json"):
        load_predictor(str(tmp_path / "run"))


@pytest.mark.slow
def test_a_detector_of_unknown_classes_takes_those_of_the_json(program, trained, images, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "categories.json").unlink()
    truth = coco_data.content()
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    argv = ["--model", tmp_path / "run", "--annotations", tmp_path / "truth.json", "--no-pictures"]
    status, _, err = program(images, *argv, "--output-dir", tmp_path / "out")
    assert status == 0, err
    found = predictions(tmp_path / "out")["categories"]
    assert {c["id"]: c["name"] for c in found} == {c["id"]: c["name"] for c in truth["categories"]}


@pytest.mark.slow
def test_masks_are_in_the_json(program, tmp_path, images):
    cfg = toy.plain_config(toy.RCNN, opts=["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"])
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    argv = ["--model", tmp_path, "--output-dir", tmp_path / "out", "--score-threshold", "0"]
    assert program(images / "1.png", *argv)[0] == 0
    content = predictions(tmp_path / "out")
    loaded = COCO(str(tmp_path / "out" / "predictions.json"))
    entries = content["annotations"]
    assert len(entries) > 0 and content["categories"][0]["name"] == "T-shirt/top"  # of the config's DATASETS.TRAIN
    assert all(loaded.annToMask(e).shape == coco_data.SIZE and loaded.annToMask(e).sum() == e["area"] for e in entries)
