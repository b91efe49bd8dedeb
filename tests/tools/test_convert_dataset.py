"""tools/convert_dataset.py as a user runs it."""

import json
import shlex

import coco_data
import numpy as np
import programs
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from mgd_det.cli.convert_dataset import main
from mgd_det.data import register_coco_folder

NAME = "test_convert_tool"


@pytest.fixture
def program(capsys):
    """Runs it in this process; returns (exit status, stdout, stderr)."""

    yield lambda *argv: (programs.exit_status(main, *argv), *capsys.readouterr())
    coco_data.forget(NAME)


def image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (50, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def yolo(tmp_path):
    root = tmp_path / "yolo"
    for split, seed in (("train", 0), ("val", 1)):
        image(root / "images" / split / "a.png", seed)
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "a.txt").write_text("1 0.1 0.2 0.3 0.2 0.3 0.6\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [ship, plane]\n")
    return root


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "voc"
    image(root / "JPEGImages" / "a.jpg", 0)
    (root / "Annotations").mkdir()
    box = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox>"
    xml = f"<annotation><object><name>car</name>{box}</object></annotation>"
    (root / "Annotations" / "a.xml").write_text(xml)
    return root


def flags(out):
    """The flags of tools/train_net.py that it prints."""
    words = [shlex.split(line.split("To use it: ")[1]) for line in out.splitlines() if "To use it: " in line]
    return {flag: value for line in words for flag, value in zip(line[::2], line[1::2])}


def test_detectron2_loads_what_came_of_yolo(program, yolo, tmp_path):
    status, out, err = program(yolo, "--output-dir", tmp_path / "coco")
    assert status == 0, out + err
    assert out.count("0 problems that break training") == 2  # the checker has read both
    given = flags(out)
    assert sorted(given) == ["--train-images", "--train-json", "--val-images", "--val-json"]
    assert register_coco_folder(NAME, given["--train-json"], given["--train-images"]) == ["ship", "plane"]
    (loaded,) = DatasetCatalog.get(NAME)
    (thing,) = loaded["annotations"]
    assert loaded["file_name"] == str(yolo / "images" / "train" / "a.png") and thing["category_id"] == 1
    assert thing["bbox"] == pytest.approx([10, 10, 20, 20])
    assert thing["segmentation"] == [pytest.approx([10, 10, 30, 10, 30, 30])]


def test_detectron2_loads_what_came_of_voc(program, voc, tmp_path):
    status, out, err = program(voc, "--output-dir", tmp_path / "coco")
    assert status == 0, out + err
    given = flags(out)
    register_coco_folder(NAME, given["--train-json"], given["--train-images"])
    assert DatasetCatalog.get(NAME)[0]["annotations"][0]["bbox"] == [10, 5, 20, 20]


def test_nothing_is_replaced(program, yolo, tmp_path):
    folder = tmp_path / "coco"
    folder.mkdir()
    (folder / "instances_val.json").write_text("mine")
    status, _, err = program(yolo / "data.yaml", "--output-dir", folder)
    assert status == 1 and str(folder / "instances_val.json") in err
    assert (folder / "instances_val.json").read_text() == "mine" and len(list(folder.iterdir())) == 1


def test_nothing_is_written_if_a_line_is_bad(program, yolo, tmp_path):
    (yolo / "labels" / "val" / "a.txt").write_text("7 0.5 0.5 0.2 0.2\n")
    status, _, err = program(yolo, "--output-dir", tmp_path / "coco")
    assert status == 1 and f"{yolo / 'labels' / 'val' / 'a.txt'}, line 1" in err
    assert not (tmp_path / "coco").exists()


def test_the_checker_decides_on_the_exit_status(program, yolo, tmp_path):
    coco_data.truncate(yolo / "images" / "val" / "a.png")  # the header can still be read
    status, out, _ = program(yolo, "--output-dir", tmp_path / "coco")
    assert status == 1 and "unreadable image" in out
    assert json.loads((tmp_path / "coco" / "instances_val.json").read_text())["images"]
    assert program(yolo, "--output-dir", tmp_path / "again", "--skip-decoding")[0] == 0


def test_a_source_of_neither_format(program, tmp_path):
    status, _, err = program(tmp_path, "--output-dir", tmp_path / "coco")
    assert status == 1 and str(tmp_path) in err and "data.yaml" in err and "Annotations" in err
