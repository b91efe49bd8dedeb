"""The way of docs/distill.md: distil by one line, export by one, detect with numpy, Pillow and onnxruntime only."""

import json
from pathlib import Path

import coco_data
import few_packages
import numpy as np
import programs
import pytest
import torch
import toy
from detectron2.modeling import build_model
from PIL import Image

from mgd_det.cli import distill, export
from mgd_det.engine import load_predictor

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capsys):
    """Runs a program in this process, which saves the imports of each, and returns what it prints."""

    def call(main, *argv):
        status = programs.exit_status(main, *argv)
        assert status == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_commands(run, tmp_path):
    json_file, images = coco_data.write(tmp_path / "data", coco_data.content())
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    cfg = toy.teacher_config(opts=["MODEL.RETINANET.NUM_CLASSES", "3"])
    (teacher / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(7)
    network = build_model(cfg)
    toy.randomize_norms(network)
    torch.save({"model": network.state_dict()}, teacher / "model_final.pth")
    data = ["--train-json", json_file, "--train-images", images, "--val-json", json_file, "--val-images", images]
    small = ["MODEL.WEIGHTS", "", "MODEL.MOBILENETS.NORM", "BN", "MODEL.MOBILENETS.WIDTH_MULT", "0.25"]
    small += ["DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.001"]
    student = ["--student", "mobilenetv2", "--iterations", "2", "--batch", "2", "--output-dir", tmp_path / "run"]
    run(distill.main, "--teacher", teacher, *student, *data, *small)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "distilled" in page and all(name in page for name in coco_data.CATEGORIES.values())

    out = run(export.main, "--model", tmp_path / "run", "--output", tmp_path / "student.onnx", "--verify", "2")
    assert "on 2 images of coco_folder_val" in out and " NO" not in out

    found_file = tmp_path / "found.json"
    argv = [tmp_path / "student.onnx", images, "--json", found_file, "--annotations", json_file]
    status, _, err = few_packages.run(ROOT / "projects" / "Deploy" / "detect.py", *argv)
    assert status == 0, err
    assert "'onnxruntime'" in err and "'torch'" not in err.splitlines()[-1]
    found = json.loads(found_file.read_text())
    predictor = load_predictor(str(tmp_path / "run"), ["MODEL.DEVICE", "cpu"])
    for number in (1, 2):
        entries = [entry for entry in found if entry["image_id"] == number]
        expected = predictor(np.asarray(Image.open(images / f"{number}.png")))
        assert len(entries) == len(expected) > 0
        boxes = expected.pred_boxes.tensor.numpy()
        boxes[:, 2:] -= boxes[:, :2]
        ids = sorted(coco_data.CATEGORIES)
        categories = np.array([ids[i] for i in expected.pred_classes])
        # Not in their order, which is that of scores: an untrained detector has some that are equal.
        free = np.ones(len(boxes), dtype=bool)
        for entry in entries:
            is_same = free & (categories == entry["category_id"])
            (same,) = np.nonzero(is_same & (np.abs(boxes - entry["bbox"]).max(axis=1) < 0.05))
            assert len(same) > 0, entry
            free[same[0]] = False
