"""Every student exported in one detector or another. dev/export_table.py does all pairs, and cores in ONNX."""

import importlib.util

import exported
import pytest

from mgd_det.export import ExportedDetector, Tolerance, detector_settings, verify, write_model

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("detector, student", exported.PAIRS)
def test_it_is_equal_to_the_one_in_pytorch(detector, student, tmp_path):
    if student.startswith("timm") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    difference = exported.exported_difference(detector, student, tmp_path, core_format="torch")
    # Rounding grows through a hundred random layers, in images of twice the network's input.
    assert difference.beyond(Tolerance(boxes=0.5, unmatched=0.05)) == [], difference
    assert difference.detections > 5
    assert ("masks" in difference.values) == ("mask" in detector)
    assert ("keypoints" in difference.values) == ("keypoint" in detector)


@pytest.mark.slow
def test_a_light_detector_in_onnx_is_equal_to_the_one_in_pytorch(tmp_path):
    opts = ["MODEL.BACKBONE.NAME", "build_retinanet_resnet_separable_fpn_backbone"]
    opts += ["MODEL.META_ARCHITECTURE", "SeparableRetinaNet"]
    model, cfg = exported.build("retinanet", "R18", opts, spread=True)
    path = str(tmp_path / "model.onnx")
    write_model(model, detector_settings(cfg, model, exported.CLASSES), path, "onnx")
    difference = verify(model, ExportedDetector(path, threads=1), exported.inputs(), least=1e-3)
    assert difference.beyond(Tolerance(boxes=0.5, unmatched=0.05)) == [], difference
    assert difference.detections > 5
