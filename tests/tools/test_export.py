"""tools/export.py as a user runs it."""

import json
import runpy
import sys
from pathlib import Path

import coco_data
import exported
import numpy as np
import pytest
import torch
import toy
from PIL import Image

import mgd_det.cli.export as program
from mgd_det.cli.export_data import verification_inputs
from mgd_det.engine import load_predictor
from mgd_det.errors import UserError
from mgd_det.export import ExportedDetector

pytest.importorskip("onnxscript")  # where it is installed, torch is new enough for these exports too
SCRIPT = Path(__file__).parents[2] / "tools" / "export.py"


@pytest.fixture
def export(monkeypatch, capsys, caplog):
    """Runs it in this process; returns (exit status, stdout, stderr with the log's warnings)."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err + caplog.text  # pytest takes the log away from stderr

    return run


@pytest.fixture(autouse=True)
def no_sets_of_other_tests():
    coco_data.forget("coco_folder_")
    yield
    coco_data.forget("coco_folder_")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """(folder of a training, (its detector, its config)) on drawn scenes."""
    folder = tmp_path_factory.mktemp("training")
    flags = toy.write_scenes(folder / "scenes", train=6, val=4)
    paths = dict(zip((flag[2:].replace("-", "_").upper() for flag in flags[::2]), flags[1::2]))
    opts = [part for key, path in paths.items() for part in (f"DATASETS.COCO_FOLDER.{key}", path)]
    model, cfg = exported.build("retinanet", "R18", [*opts, "OUTPUT_DIR", str(folder / "elsewhere")])
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    return folder, model, cfg


@pytest.mark.slow
def test_a_torch_export_of_a_folder_verified_on_its_images(training, export, tmp_path):
    folder, model, _ = training
    status, out, err = export("--model", folder, "--format", "torch", "--output", tmp_path / "a.pt2")
    assert status == 0, err
    assert "on 4 images of coco_folder_val" in out and "NO" not in out
    assert "64 x 64, 51 x 51, 83 x 83, 38 x 38" in out
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]
    loaded = ExportedDetector(str(tmp_path / "a.pt2"))
    known = json.loads((folder / "scenes/annotations/instances_val.json").read_text())["categories"]
    assert loaded.settings["classes"] == [entry["name"] for entry in known]
    assert loaded.settings["category_ids"] == [entry["id"] for entry in known]
    (entry,) = exported.inputs(((70, 64),))
    expected, found = model([entry])[0]["instances"], loaded([entry])[0]["instances"]
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=0.01, rtol=0)
    # mgd-predict takes it too.
    predictor = load_predictor(str(tmp_path / "a.pt2"))
    assert predictor.categories == [{"id": entry["id"], "name": entry["name"]} for entry in known]
    pixels = np.random.default_rng(0).integers(0, 256, (70, 64, 3), dtype=np.uint8)
    by_file, by_folder = predictor(pixels), load_predictor(str(folder))(pixels)
    torch.testing.assert_close(by_file.pred_boxes.tensor, by_folder.pred_boxes.tensor, atol=0.01, rtol=0)
    assert by_file.pred_classes.tolist() == by_folder.pred_classes.tolist() and len(by_file) > 0
    with pytest.raises(UserError, match="a.pt2.*MODEL.DEVICE"):
        load_predictor(str(tmp_path / "a.pt2"), ["MODEL.DEVICE", "cpu"])


@pytest.mark.slow
def test_a_model_that_differs_is_not_written(training, export, tmp_path, monkeypatch):
    folder, _, _ = training
    original = program.write_model

    def changed(detector, *args):
        with torch.no_grad():
            detector.head.bbox_pred.weight *= 1.5
            original(detector, *args)
            detector.head.bbox_pred.weight /= 1.5

    monkeypatch.setattr(program, "write_model", changed)
    target = tmp_path / "a.pt2"
    target.write_text("the model of yesterday")
    status, out, err = export("--model", folder, "--format", "torch", "--output", target)
    assert status == 1 and "differs from the one in PyTorch in" in err and "boxes" in err and "Traceback" not in err
    assert " NO" in out
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]
    assert target.read_text() == "the model of yesterday"


@pytest.mark.slow
def test_without_the_data_of_the_training(training, export, tmp_path):
    folder, model, cfg = training
    cfg = cfg.clone()
    cfg.DATASETS.COCO_FOLDER.VAL_JSON = str(tmp_path / "moved.json")
    (tmp_path / "model.yaml").write_text(cfg.dump())
    argv = ["--model", tmp_path / "model.yaml", "--format", "torch", "--output", tmp_path / "a.pt2"]
    status, out, err = export(*argv, "--verify", "2", "MODEL.WEIGHTS", folder / "model_final.pth")
    assert status == 0 and "moved.json" in err and "on 2 images of synthetic pictures" in out
    status, _, err = export(*argv)
    assert status == 1 and "MODEL.WEIGHTS" in err


def test_images_to_verify_on(training, tmp_path):
    folder, _, cfg = training
    images = folder / "scenes/images/train"
    inputs, source = verification_inputs(cfg, [str(images)], 3)
    assert source == "--verify-images" and [entry["image"].shape[1] for entry in inputs] == [64, 51, 83]
    assert all((entry["height"], entry["width"]) == (64, 64) for entry in inputs)
    first = sorted(images.iterdir())[0]
    expected = np.asarray(Image.open(first).convert("RGB"))[:, :, ::-1].transpose(2, 0, 1)
    np.testing.assert_array_equal(inputs[0]["image"].numpy(), expected)
    cfg = cfg.clone()
    cfg.DATASETS.TEST = ("a_set_that_nobody_registered",)
    inputs, source = verification_inputs(cfg, [], 5)
    assert len(inputs) == 5 and source.startswith("synthetic pictures")
    (tmp_path / "a.png").write_bytes(b"no image")
    for path, message in (("nothing.png", "does not exist"), (tmp_path / "a.png", "cannot be read")):
        with pytest.raises(UserError, match=message):
            verification_inputs(cfg, [str(path)], 1)
    with pytest.raises(UserError, match="has no image"):
        verification_inputs(cfg, [str(folder / "scenes")], 1)


@pytest.mark.slow
def test_int8_with_ap_before_and_after(training, export, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder, _, _ = training
    files = []
    quantize = program.quantize_core
    monkeypatch.setattr(program, "quantize_core", lambda *args: files.append(args[:2]) or quantize(*args))
    output = tmp_path / "int8.onnx"
    status, out, err = export("--model", folder, "--output", output, "--int8", "--calibration-images", "3")
    assert status == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "int8_ap.json"]
    ((source, quantized),) = files
    assert source != quantized  # or else the AP of float32 is that of int8
    scores = json.loads((tmp_path / "int8_ap.json").read_text())
    assert list(scores) == ["float32", "int8"]
    assert all(np.isfinite(values["coco_folder_val"]["AP"]) for values in scores.values())
    assert "float32  coco_folder_val" in out and "int8     coco_folder_val" in out
    operations = {node.op_type for node in pytest.importorskip("onnx").load(output).graph.node}
    assert "QuantizeLinear" in operations


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--output", "a.xml"], "must end in .onnx"),
        (["--output", "a.xml", "--format", "openvino", "--with-nms"], "--format onnx only"),
        (["--output", "a.onnx", "--int8", "--with-nms"], "leave --with-nms out"),
        (["--output", "a.onnx", "--int8", "--calibration-json", "a.json"], "--calibration-folder"),
        (["--output", "a.onnx", "--verify", "-1"], "--verify -1"),
    ],
)
def test_flags_that_do_not_go_together(export, argv, message):
    status, _, err = export("--model", "nothing", *argv)
    assert status == 2 and message in err


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "no config.yaml and no student.yaml"),
        (
            lambda folder: (folder / "config.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet}"),
            "no model_final.pth and no checkpoint",
        ),
    ],
)
def test_a_folder_that_is_no_training(export, tmp_path, make, message):
    make(tmp_path)
    status, _, err = export("--model", tmp_path, "--format", "torch", "--output", tmp_path / "a.pt2")
    assert status == 1 and message in err and "Traceback" not in err and not (tmp_path / "a.pt2").exists()


@pytest.mark.slow
def test_weights_that_leave_a_part_unset(training, export, tmp_path):
    folder, model, _ = training
    part = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.cls_score")}
    torch.save({"model": part}, tmp_path / "part.pth")
    argv = ["--model", folder, "--format", "torch", "--output", tmp_path / "a.pt2"]
    status, _, err = export(*argv, "MODEL.WEIGHTS", tmp_path / "part.pth")
    assert status == 1 and "2 tensors" in err and "head.cls_score" in err


def test_only_sets_that_are_here_are_scored(training, monkeypatch):
    cfg = training[2].clone()
    cfg.DATASETS.TEST = ("coco_2017_val", "a_set_that_nobody_registered")
    monkeypatch.setattr(program, "ExportedDetector", lambda *_: None)
    assert program._scores(cfg, "int8.onnx") == {}
