"""tools/benchmark.py --inference."""

import csv
import json
import re

import exported
import numpy as np
import pytest
import torch

import mgd_det.cli.benchmark as benchmark
import mgd_det.cli.benchmark_inference as benchmark_inference
from mgd_det.benchmark.inference import InferenceBenchmark
from mgd_det.cli.arguments import named_file
from mgd_det.cli.benchmark_inference import table


def test_ratios_are_to_the_first_of_the_same_size_in_the_same_round():
    times = {
        "a, 64x64, PyTorch": [1.0, 2.0, 4.0],
        "a, 96x96, PyTorch": [8.0, 8.0, 8.0],
        "b, 64x64, OpenVINO": [0.5, 1.0, 2.0],
        "b, 96x96, OpenVINO": [2.0, 4.0, 2.0],
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(times).splitlines()[2:]]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("a", "64x64", "PyTorch", "1.00"),
        ("a", "96x96", "PyTorch", "1.00"),
        ("b", "64x64", "OpenVINO", "0.50"),
        ("b", "96x96", "OpenVINO", "0.25"),
    ]
    assert rows[0][3] == "2000.0 ms"


@pytest.mark.slow
def test_every_runtime_and_part_computes_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    detector, cfg = exported.build("retinanet", "R18")
    measured = InferenceBenchmark(detector, cfg, str(tmp_path), threads=1, openvino=True)
    assert measured.parameters == sum(p.numel() for p in detector.parameters())
    assert measured.file_bytes["ONNX Runtime"] > 4 * 0.9 * measured.parameters
    networks = measured.networks((64, 96))
    assert list(networks) == ["PyTorch", "ONNX Runtime", "ONNX Runtime int8", "OpenVINO"]
    expected = [output.numpy() for output in networks["PyTorch"]()]
    for name in ("ONNX Runtime", "OpenVINO"):
        for one, other in zip(expected, networks[name]()):
            np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(one).max())
    parts = measured.parts((64, 96))
    levels = parts["part: FPN"]()
    head = parts["part: head"]()
    assert [level.shape[-2:] for level in levels.values()] == [part.shape[-2:] for part in head[0]]
    torch.testing.assert_close([x for part in head for x in part], [torch.from_numpy(x) for x in expected])
    before, again = (parts["part: post-processing"]()[0].pred_boxes.tensor for _ in range(2))
    np.testing.assert_array_equal(before, again)  # the first call has not changed its input
    found = parts["part: post-processing in numpy"]()
    np.testing.assert_allclose(found.boxes[0], before[0].clamp(min=0), atol=0.01)


class Measured:
    """In place of InferenceBenchmark, which takes long to export."""

    parameters, file_bytes = 2_500_000, {"ONNX Runtime": 10 * 2**20}

    def __init__(self, detector, cfg, folder, threads, openvino):
        assert not detector.training and cfg.MODEL.FPN.OUT_CHANNELS == 32 and threads == 1

    def networks(self, size):
        return {"PyTorch": lambda: sum(range(3000)), "ONNX Runtime": lambda: sum(range(1000))}

    def parts(self, size):
        raise AssertionError("not asked for")


def test_the_program(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_inference, "InferenceBenchmark", Measured)
    argv = ["--inference", "--config-file", "FashionScenes/retinanet_MobileNetV2_FPN.yaml", "--size", "64x64"]
    threads = torch.get_num_threads()
    files = ["--output", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]
    try:
        benchmark.main([*argv, "--rounds", "3", *files, "MODEL.FPN.OUT_CHANNELS", "32"])
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert re.search(r"retinanet_MobileNetV2_FPN \| +2.50 *\| +10.0 *\|", out)
    written = json.loads((tmp_path / "a.json").read_text())
    name = "retinanet_MobileNetV2_FPN, 64x64, "
    assert set(written["ratios"]) == {name + "PyTorch", name + "ONNX Runtime"}
    assert written["ratios"][name + "PyTorch"]["median"] == 1.0 and written["seconds"][name + "PyTorch"]["median"] > 0
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["detector"], row["size"], row["measured"], row["threads"]) for row in rows] == [
        ("retinanet_MobileNetV2_FPN", "64x64", "PyTorch", "1"),
        ("retinanet_MobileNetV2_FPN", "64x64", "ONNX Runtime", "1"),
    ]
    for row in rows:
        seconds = written["rounds_s"][name + row["measured"]]
        assert float(row["median_ms"]) == pytest.approx(1000 * np.median(seconds), abs=1e-4)
        lower, upper = 1000 * np.percentile(seconds, [25, 75])
        assert [float(row["lower_ms"]), float(row["upper_ms"])] == pytest.approx([lower, upper], abs=1e-4)
        first = np.array(written["rounds_s"][name + "PyTorch"])
        assert float(row["ratio"]) == pytest.approx(np.median(np.array(seconds) / first), abs=1e-4)


@pytest.mark.parametrize(
    "text, name, file",
    [
        ("configs/a.yaml", "a", "configs/a.yaml"),
        ("light=run/config.yaml", "light", "run/config.yaml"),
        ("lr=1/config.yaml", "lr", "1/config.yaml"),
        ("run/lr=1/config.yaml", "config", "run/lr=1/config.yaml"),
    ],
)
def test_a_config_has_its_own_name_or_that_of_its_file(text, name, file):
    assert named_file(text) == (name, file)


def test_two_configs_of_one_name_are_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--inference", "--config-file", "a/config.yaml", "--config-file", "b/config.yaml"])
    assert "two detectors have the name 'config': give NAME=FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.main(["--inference", "--config-file", "=b/config.yaml"])
    assert "name ''" in capsys.readouterr().err
