"""The report of a load, part by part."""

import logging
import re

import pytest
import torch
import toy
from detectron2.modeling import build_model

from mgd_det.checkpoint import LoadReport, WeightsCheckpointer
from mgd_det.checkpoint.load_report import part_of


@pytest.mark.parametrize(
    "name, part",
    [
        ("backbone.bottom_up.res2.0.conv1.weight", "bottom_up"),
        ("backbone.fpn_lateral3.norm.weight", "fpn"),
        ("backbone.fpn_output5.bias", "fpn"),
        ("backbone.fpn.inner_blocks.0.0.bias", "fpn"),
        ("backbone.top_block.p6.weight", "top_block"),
        ("backbone.res2.0.conv1.weight", "backbone"),
        ("proposal_generator.rpn_head.conv.bias", "proposal_generator"),
        ("roi_heads.box_head.fc1.weight", "roi_heads.box_head"),
        ("roi_heads.box_predictor.0.cls_score.weight", "roi_heads.box_predictor"),
        ("head.cls_subnet.0.weight", "head"),
        ("fc.weight", "fc"),
        ("pixel_mean", "pixel_mean"),
    ],
)
def test_parts_of_a_detector(name, part):
    assert part_of(name) == part


def cells(table):
    """Return the rows of a printed table as {part: numbers}."""
    rows = re.findall(r"^([a-z_.]+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", table, re.MULTILINE)
    return {part: [int(n) for n in numbers] for part, *numbers in rows}


def test_table():
    report = LoadReport(
        model=["head.a", "head.b", "head.c", "backbone.bottom_up.x", "backbone.bottom_up.y"],
        unset=["head.a"],
        other_shape={"head.b": ((2, 3), (4, 3))},
        unused=["fc.weight", "fc.bias", "head.d"],
    )
    assert cells(str(report)) == {"head": [3, 1, 1, 1, 1], "bottom_up": [2, 2, 0, 0, 0], "fc": [0, 0, 0, 0, 2]}
    assert report.not_loaded == ["head.a", "head.b"]
    assert report.partly_loaded() == ["head"]
    assert "Left as initialised: head.a\n" in str(report)
    assert "Other shape in the file: head.b (2, 3) in the file, (4, 3) here\n" in str(report)
    assert str(report).endswith("Unused in the file: fc.weight, fc.bias, head.d")


def test_long_lists_are_cut():
    report = LoadReport(model=[f"head.{i}" for i in range(9)], unset=[f"head.{i}" for i in range(7)])
    assert "Left as initialised: head.0, head.1, head.2, head.3, ... (7)" in str(report)
    assert "Unused" not in str(report) and "Other shape" not in str(report)


def test_a_mask_rcnn_part_by_part(tmp_path, caplog):
    detector = build_model(toy.plain_config(toy.RCNN))
    state = detector.state_dict()
    model = [key for key in state if not key.endswith("num_batches_tracked")]
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(3, 16)
    state = {key: value for key, value in state.items() if "mask_head" not in key and "fpn_output3" not in key}
    state["head.strange"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "weights.pth")
    checkpointer = WeightsCheckpointer(detector)
    with caplog.at_level(logging.INFO, logger="mgd_det.checkpoint"):
        checkpointer.load(str(tmp_path / "weights.pth"))
    [record] = [record for record in caplog.records if "Loaded weights" in record.message]
    assert record.levelno == logging.WARNING and "(fpn, roi_heads.box_predictor: only in part)" in record.message
    # Detectron2's own long warnings are gone.
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == [record]

    def count(*words):
        return sum(any(word in key for word in words) for key in model)

    mask, fpn = count("mask_head"), count("fpn_")
    output3 = count("fpn_output3")
    assert cells(record.message) == {
        "bottom_up": [count("bottom_up")] * 2 + [0, 0, 0],
        "fpn": [fpn, fpn - output3, output3, 0, 0],
        "proposal_generator": [count("proposal_generator")] * 2 + [0, 0, 0],
        "roi_heads.box_head": [count("box_head")] * 2 + [0, 0, 0],
        "roi_heads.box_predictor": [4, 3, 0, 1, 0],
        "roi_heads.mask_head": [mask, 0, mask, 0, 0],
        "head": [0, 0, 0, 0, 1],
    }
    assert sorted(checkpointer.unset_keys) == sorted(
        key for key in model if "mask_head" in key or "fpn_output3" in key or "cls_score.weight" in key
    )


def test_a_complete_load_gives_no_warning(tmp_path, caplog):
    detector = build_model(toy.plain_config())
    torch.save(detector.state_dict(), tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO):
        WeightsCheckpointer(detector).load(str(tmp_path / "weights.pth"))
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def test_a_frozen_norm_that_is_not_in_the_file_is_reported_whole(tmp_path):
    """Detectron2 does not report its missing statistics, because old files have affine layers without them."""
    detector = build_model(toy.plain_config(opts=["MODEL.RESNETS.NORM", "FrozenBN"]))
    norm = "backbone.bottom_up.res3.0.conv1.norm"
    state = {key: value for key, value in detector.state_dict().items() if not key.startswith(norm)}
    affine = "backbone.bottom_up.res3.0.conv2.norm"
    state = {key: value for key, value in state.items() if not key.startswith(f"{affine}.running")}
    torch.save({"model": dict(state)}, tmp_path / "weights.pth")
    checkpointer = WeightsCheckpointer(detector)
    checkpointer.load(str(tmp_path / "weights.pth"))
    names = ("weight", "bias", "running_mean", "running_var")
    assert sorted(checkpointer.unset_keys) == sorted(f"{norm}.{name}" for name in names)
