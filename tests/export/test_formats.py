"""Exported detectors against the ones in PyTorch."""

import os
from dataclasses import replace

import exported
import numpy as np
import pytest
import torch

from mgd_det.errors import UserError
from mgd_det.export import FORMATS, ExportedDetector, Tolerance, detector_settings, verify, write_model
from mgd_det.export.formats import openvino_from_onnx
from mgd_det.export.packages import require
from mgd_det.export.postprocessing import as_input
from mgd_det.export.quantization import quantize_core

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
TOLERANCE = Tolerance()


def export(model, cfg, folder, model_format="onnx", whole=False, pixels=None):
    path = str(folder / f"model{FORMATS[model_format]}")
    write_model(model, detector_settings(cfg, model, exported.CLASSES, whole=whole), path, model_format, pixels)
    return ExportedDetector(path, threads=1)


def assert_equal(model, exported_model, images):
    difference = verify(model, exported_model, images, least=1e-3)
    assert difference.beyond(TOLERANCE) == [], difference
    assert difference.detections > 20
    return difference


# The export takes seconds.
@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) for name in ("retinanet", "fcos")])
def core(request):
    return exported.core_in_onnx(request.param)


def test_core_in_onnx_at_other_sizes_than_the_traced_one(core):
    model, _, onnx_model = core
    difference = assert_equal(model, onnx_model, exported.inputs())
    assert difference.sizes == list(exported.SIZES)
    assert set(difference.values) == {"outputs", "boxes", "scores", "unmatched"}


def test_a_batch(core):
    """Each image of a batch has the outputs that it has alone."""
    _, _, onnx_model = core
    pixels = np.random.default_rng(0).uniform(0, 255, (3, 64, 96)).astype(np.float32)
    one, other = as_input(pixels, onnx_model.settings), as_input(pixels[:, ::-1], onnx_model.settings)
    together = onnx_model._run(np.concatenate([one, other, one]))
    for a, b, both in zip(onnx_model._run(one), onnx_model._run(other), together):
        np.testing.assert_allclose(both, np.concatenate([a, b, a]), atol=1e-3, rtol=1e-3)


def test_a_changed_weight_is_a_difference(core):
    model, _, onnx_model = core
    weight = model.head.bbox_pred.weight
    with torch.no_grad():
        weight *= 1.5
        difference = verify(model, onnx_model, exported.inputs(), least=1e-3)
        weight /= 1.5
    assert "outputs" in difference.beyond(TOLERANCE) and len(difference.beyond(TOLERANCE)) > 1


def test_a_difference_that_is_not_a_number_is_beyond_the_tolerance(core):
    model, _, onnx_model = core
    difference = verify(model, onnx_model, exported.inputs()[:1], least=1e-3)
    difference.values["boxes"] = float("nan")
    assert difference.beyond(TOLERANCE) == ["boxes"]
    assert difference.beyond(replace(TOLERANCE, scores=-1.0)) == ["boxes", "scores"]


def test_openvino(core, tmp_path):
    pytest.importorskip("openvino")
    model, _, onnx_model = core
    path = str(tmp_path / "model.xml")
    openvino_from_onnx(onnx_model.path, onnx_model.settings, path)
    openvino_model = ExportedDetector(path, threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert openvino_model.settings == onnx_model.settings
    assert_equal(model, openvino_model, exported.inputs())


@pytest.mark.slow
def test_torch_export(core, tmp_path):
    model, cfg, onnx_model = core
    torch_model = export(model, cfg, tmp_path, "torch")
    assert torch_model.settings == onnx_model.settings
    assert_equal(model, torch_model, exported.inputs())


def test_int8_is_smaller_and_finds_about_the_same(core, tmp_path):
    model, cfg, onnx_model = core
    path, images = tmp_path / "int8.onnx", exported.inputs()
    source = onnx_model.path
    quantize_core(source, str(path), onnx_model.settings, images)
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]
    assert path.stat().st_size < 0.45 * os.path.getsize(source)
    int8 = ExportedDetector(str(path), threads=1)
    assert int8.settings == onnx_model.settings
    pixels = images[0]["image"].numpy()
    for exact, rounded in zip(onnx_model.raw_outputs(pixels)[:2], int8.raw_outputs(pixels)):
        error = np.abs(exact - rounded).mean() / np.abs(exact - exact.mean()).mean()
        assert 1e-6 < error < 0.5
    with pytest.raises(UserError, match="no image"):
        quantize_core(source, str(tmp_path / "none.onnx"), onnx_model.settings, [])
    assert not (tmp_path / "none.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_whole_dense_detector(detector, tmp_path):
    model, cfg, _ = exported.core_in_onnx(detector)
    images = exported.inputs()
    whole = export(model, cfg, tmp_path, whole=True, pixels=images[1]["image"].float())
    assert whole.settings["kind"] == "whole"
    assert_equal(model, whole, images)


def test_an_rcnn_has_no_core():
    model, cfg = exported.build("faster_rcnn", "R18")
    with pytest.raises(UserError, match="--with-nms"):
        detector_settings(cfg, model, exported.CLASSES)


def test_a_package_that_is_missing():
    with pytest.raises(UserError, match=r"pip install 'mgd_det\[export\]'"):
        require("onnx.nothing_of_this_name")


@pytest.mark.parametrize(
    "name, message", [("a.onnx", "does not exist"), ("a.txt", "none of .onnx"), ("b.onnx", "cannot be read")]
)
def test_a_file_that_is_no_exported_model(tmp_path, name, message):
    (tmp_path / "b.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=message):
        ExportedDetector(str(tmp_path / name))
