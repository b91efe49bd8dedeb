"""What a detector costs, and tools/benchmark.py --costs."""

import pytest
import toy
from detectron2.modeling import build_model
from fvcore.nn import FlopCountAnalysis

from mgd_det.benchmark.costs import NetworkRun
from mgd_det.cli import benchmark
from mgd_det.cli.benchmark_costs import table
from mgd_det.export.core import DenseCore

pytestmark = pytest.mark.slow


def test_multiply_adds_of_a_dense_detector_are_those_that_fvcore_counts():
    detector = build_model(toy.plain_config(student="mobilenetv2")).eval().cpu()
    run = NetworkRun(detector, 64, 96)
    images = run._images.tensor
    counted = FlopCountAnalysis(DenseCore(detector), images).unsupported_ops_warnings(False)
    by_operator = counted.by_operator()
    assert run.multiply_adds() == by_operator["conv"] > 0


def test_multiply_adds_of_an_rcnn_count_every_proposal_and_a_hundred_masks():
    proposals = 7
    opts = ["MODEL.RPN.POST_NMS_TOPK_TEST", str(proposals), "MODEL.RPN.NMS_THRESH", "1.0"]
    detector = build_model(toy.plain_config(toy.RCNN, "resnet", opts)).eval().cpu()
    total = NetworkRun(detector, 64, 64).multiply_adds()
    features = {name: 16 * side**2 for name, side in (("p2", 16), ("p3", 8), ("p4", 4), ("p5", 2), ("p6", 1))}
    backbone = FlopCountAnalysis(detector.backbone, NetworkRun(detector, 64, 64)._images.tensor)
    rpn = sum(values * (9 * 16 + 3 + 12) for values in features.values())
    box = proposals * (16 * 49 * 16 + 16 * 16 + 16 * 11 + 16 * 40)
    mask = 100 * (2 * 16 * 16 * 9 * 196 + 16 * 16 * 4 * 196 + 16 * 10 * 784)
    assert total == backbone.unsupported_ops_warnings(False).by_operator()["conv"] + rpn + box + mask


def test_ratios_are_to_the_first_in_the_same_round():
    sizes = {"a": ["1.00", "2.00"], "b": ["0.50", "0.10"]}
    rows = table(sizes, {"a": [1.0, 2.0, 4.0], "b": [0.5, 0.5, 0.5]}).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells == [
        ["a", "1.00", "2.00", "2000", "1.00", "1.00 to 1.00"],
        ["b", "0.50", "0.10", "500", "0.25", "0.19 to 0.38"],
    ]


def test_the_program_compares_with_the_first(capsys):
    wide, light = (f"FashionScenes/retinanet_MobileNetV2{light}_FPN.yaml" for light in ("", "_light"))
    benchmark.main(["--costs", "--config-file", wide, "--config-file", light, "--size", "160x160", "--rounds", "1"])
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["retinanet_MobileNetV2_FPN", "retinanet_MobileNetV2_light_FPN"]
    assert float(rows[1][1]) < float(rows[0][1]) and float(rows[1][2]) < 0.7 * float(rows[0][2])
    with pytest.raises(SystemExit):
        benchmark.main(["--costs", "--config-file", "nothing.yaml"])
    assert "nothing.yaml" in capsys.readouterr().err


def test_two_detectors_of_one_name_are_refused_and_a_name_tells_them_apart(capsys):
    file = "FashionScenes/retinanet_MobileNetV2_light_FPN.yaml"
    small = ["--size", "160x160", "--rounds", "1"]
    with pytest.raises(SystemExit):
        benchmark.main(["--costs", "--config-file", file, "--config-file", f"elsewhere/{file}", *small])
    assert "--config-file" in (error := capsys.readouterr().err) and "'retinanet_MobileNetV2_light_FPN'" in error
    benchmark.main(["--costs", "--config-file", file, "--config-file", f"again={file}", *small])
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["retinanet_MobileNetV2_light_FPN", "again"]
