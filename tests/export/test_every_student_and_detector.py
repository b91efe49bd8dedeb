"""Every student in every detector. dev/export_table.py writes all of them as ONNX, which takes a quarter of an hour.

Each student is exported in one detector, and so each detector with two students or more. The other pairs are traced,
which is what an export does with both at once; what follows translates one operation after another. test_formats.py
writes cores in every format.
"""

import exported
import pytest
import torch
import toy

from mgd_det.export.core import DenseCore, traced_core
from mgd_det.export.whole import traceable

TRACED, OTHER = (entry["image"].float() for entry in exported.inputs(((64, 96), (96, 64))))
TRACED_PAIRS = [
    (detector, student)
    for detector in exported.DETECTORS
    for student in toy.STUDENTS
    if (detector, student) not in exported.PAIRS
]
# RetinaNet and FCOS have a core, which torch.export takes: it reads the code of the student in its own way.
CORE_PAIRS = [pair for pair in exported.PAIRS if pair[0] in ("retinanet", "fcos")]
WHOLE_PAIRS = [pair for pair in exported.PAIRS if pair not in CORE_PAIRS]
LIGHT = (
    "retinanet",
    "R18",
    ["MODEL.BACKBONE.NAME", "build_retinanet_resnet_separable_fpn_backbone"]
    + ["MODEL.META_ARCHITECTURE", "SeparableRetinaNet"],
)


@pytest.mark.slow
@pytest.mark.parametrize("detector, student", TRACED_PAIRS)
def test_its_trace_finds_the_same_in_an_image_of_another_size(detector, student):
    if student.startswith("timm"):
        pytest.importorskip("timm")
    model, _ = exported.build(detector, student, spread=True)
    with traceable(model, TRACED) as adapter, torch.jit.optimized_execution(False):
        expected = adapter(OTHER)
        found = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)(OTHER)
    assert len(expected[0]) > 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("detector, student", WHOLE_PAIRS)
def test_it_is_equal_to_the_one_in_pytorch(detector, student, tmp_path):
    pytest.importorskip("onnxruntime")
    difference = exported.exported_difference(detector, student, tmp_path, whole=True)
    assert difference.beyond(exported.TOLERANCE) == [], difference
    assert difference.detections > 5
    assert ("masks" in difference.values) == ("mask" in detector)
    assert ("keypoints" in difference.values) == ("keypoint" in detector)


@pytest.mark.slow
@pytest.mark.parametrize("detector, student, opts", [*((*pair, []) for pair in CORE_PAIRS), LIGHT])
def test_its_core_has_the_same_raw_outputs(detector, student, opts):
    if student.startswith("timm"):
        pytest.importorskip("timm")
    model, _ = exported.build(detector, student, opts)
    images = torch.randn(2, 3, 288, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = traced_core(model).module()(images), DenseCore(model).eval()(images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
