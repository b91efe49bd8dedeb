"""Curves, AP over latency, and the table of latency."""

import importlib.util

import pytest
from accuracy_study.curves import draw_curves
from accuracy_study.latency import detectors_of_arms
from study_results import block, result, run_report, write_results

from mgd_det.errors import UserError


def drawn(monkeypatch, call):
    """The axes of a picture that ``call`` draws."""
    figures = []
    for module in ("accuracy_study.curves", "accuracy_study.latency"):
        original = importlib.import_module(module).new_figure

        def kept(*size, original=original):
            figures.append(original(*size))
            return figures[-1]

        monkeypatch.setattr(f"{module}.new_figure", kept)
    call()
    return figures[0].axes


def test_curves_have_bands_of_one_standard_error_and_the_teacher_a_line(monkeypatch, tmp_path):
    rows = [result("teacher", 0, 20.0, iterations=0)]
    rows += [result("a", 1, 2.0, "200:1.0 400:2.0"), result("a", 2, 4.0, "200:3.0 400:4.0")]
    by_iteration, by_time = drawn(monkeypatch, lambda: draw_curves(rows, tmp_path / "a.png"))
    level, line = by_iteration.get_lines()
    assert list(level.get_ydata()) == [20.0, 20.0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([200, 400], [2.0, 3.0])
    (band,) = by_iteration.collections
    # Of 1 and 3: mean 2, error 1; of 2 and 4: mean 3, error 1.
    points = {tuple(point) for point in band.get_paths()[0].vertices}
    assert {(200, 1.0), (200, 3.0), (400, 2.0), (400, 4.0)} == points
    assert list(by_time.get_lines()[1].get_xdata()) == [40.0, 80.0]  # 0.2 s a step
    assert [text.get_text() for text in by_iteration.get_legend().get_texts()] == ["teacher", "a"]


LATENCY = """detector,size,measured,median_ms,lower_ms,upper_ms,ratio,threads,torch,machine
light,320x320,ONNX Runtime,20.0,19.0,22.0,0.4,1,2.0,abacus
light,320x320,PyTorch,50.0,49.0,52.0,1.0,1,2.0,abacus
light,320x320,part: head,5.0,4.0,6.0,0.1,1,2.0,abacus
light,128x128,ONNX Runtime,5.0,4.0,6.0,0.5,1,2.0,abacus
heavy_mgd,320x320,ONNX Runtime,180.4,175.0,190.0,3.6,1,2.0,abacus
"""


def latency_page(page):
    rows = [result("alone", 1, 10.0, config="x/light.yaml"), result("alone", 2, 12.0, config="x/light.yaml")]
    rows += [result("mgd", 1, 14.0, config="x/light.yaml"), result("heavy_mgd", 1, 30.0, config="x/light.yaml")]
    write_results(page.parent / "results", [*rows, result("unmeasured", 1, 5.0, config="x/other.yaml")])
    (page.parent / "results" / "latency.csv").write_text(LATENCY)
    page.write_text("<!-- results: {study: toy, show: latency, title: Fast} -->\n<!-- end of results -->\n")


def test_ap_over_latency(report, page, monkeypatch):
    latency_page(page)
    (axes,) = drawn(monkeypatch, lambda: run_report(report, page))
    assert "![Fast](accuracy_toy_latency.png)" in page.read_text()
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["alone", "mgd", "heavy_mgd"]  # the arm that was not measured is left out
    bars = dict(zip(names, axes.containers))
    assert {name: bar.lines[0].get_xydata()[0].tolist() for name, bar in bars.items()} == {
        "alone": [20.0, 11.0],
        "mgd": [20.0, 14.0],
        "heavy_mgd": [180.4, 30.0],  # by the name of the arm, before that of its config
    }
    across, along = (bars["alone"].lines[2][i].get_segments()[0].tolist() for i in (0, 1))
    assert across == [[19.0, 11.0], [22.0, 11.0]]  # the middle half of the rounds
    assert along == [[20.0, 10.0], [20.0, 12.0]]  # 10 and 12: the standard error is 1
    joins = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_color() == "#999999"]
    assert [[20.0, 11.0], [20.0, 14.0]] in joins


def test_check_notices_another_latency(report, page):
    latency_page(page)
    run_report(report, page)
    run_report(report, page, "--check")
    (page.parent / "results" / "latency.csv").write_text(LATENCY.replace("20.0,19.0", "21.0,19.0"))
    with pytest.raises(UserError, match="accuracy_toy_latency.png"):
        run_report(report, page, "--check")


@pytest.mark.parametrize(
    "options, message",
    [
        ("runtime: ONNX Runtim", "measured 'ONNX Runtim'.*Did you mean ONNX Runtime"),
        ("size: 64x64", "size '64x64'"),
        ("arms: [unmeasured]", r"\['unmeasured'\]"),
        ("latency: toy.csv", "toy.csv cannot be read .*--csv"),
    ],
)
def test_a_latency_that_there_is_not(page, options, message):
    latency_page(page)
    with pytest.raises(UserError, match=message):
        block(page, f"{{study: toy, show: latency, {options}}}")


def test_the_table_has_a_line_for_each_detector(page):
    latency_page(page)
    table = block(page, "{study: toy, show: latency_table}").text.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")]
    assert cells[0] == ["", "ONNX Runtime", "PyTorch", "AP"]
    assert cells[2:] == [
        ["light", "20.0 ms (0.40)", "50.0 ms (1.00)", "alone 11.00 ± 1.00<br>mgd 14.00"],
        ["heavy_mgd", "180 ms (3.60)", "", "heavy_mgd 30.00"],
    ]
    small = block(page, "{study: toy, show: latency_table, size: 128x128, arms: [mgd]}").text
    assert "| light | 5.0 ms (0.50) | mgd 14.00 |" in small and "heavy" not in small


def test_an_arm_is_the_detector_that_it_was_trained_as():
    def found(named=None, **others):
        return detectors_of_arms([result("arm", 1, 1.0, **others)], ["wide", "light", "R18"], named or {})

    assert found(config="x/wide.yaml") == {"arm": "wide"}
    assert found(config="x/wide_mgd_R50.yaml") == {"arm": "wide"}
    assert found(config="x/wide.yaml", overrides="MODEL.WEIGHTS a.pth MODEL.MGD.INTERVAL 2 SOLVER.MAX_ITER 9") == {
        "arm": "wide"
    }
    # Other networks: the file's latency is not theirs.
    for key in ("MODEL.BACKBONE.NAME", "MODEL.FPN.OUT_CHANNELS", "MODEL.MGD.STUDENT_BACKBONE"):
        assert found(config="x/wide.yaml", overrides=f"{key} 32") == {}
        assert found({"arm": "R18"}, config="x/wide.yaml", overrides=f"{key} 32") == {"arm": "R18"}
    assert found({"to_come": "light"}, config="x/none.yaml") == {}
    with pytest.raises(UserError, match="arm: 'R_18'.*Did you mean R18"):
        found({"arm": "R_18"})


@pytest.mark.parametrize(
    "options, message",
    [
        ("show: latency_table, size: 64x64", "size '64x64'"),
        ("show: latency_table, detectors: [light]", r"detectors is \['light'\]"),
        ("show: latency_table, detectors: {mgd: ligt}", "mgd: 'ligt'.*Did you mean light"),
        ("show: latency, detectors: {mgd: ligt}", "mgd: 'ligt'.*Did you mean light"),
        ("show: scores, detectors: {mgd: light}", "detectors.*show: scores"),
    ],
)
def test_a_mistake_about_the_detectors_is_named(page, options, message):
    latency_page(page)
    with pytest.raises(UserError, match=message):
        block(page, f"{{study: toy, {options}}}")


def test_several_pages(report, page, capsys):
    latency_page(page)
    other = page.with_name("other.md")
    other.write_text("<!-- results: {study: toy, show: latency_table} -->\n<!-- end of results -->\n")
    run_report(report, page, "--page", str(other))
    assert "heavy_mgd 30.00" in other.read_text() and "](accuracy_toy_latency.png)" in page.read_text()
    run_report(report, page, "--page", str(other), "--check")
    other.write_text(other.read_text().replace("30.00", "31.00"))
    with pytest.raises(UserError, match="other.md: not what"):
        run_report(report, page, "--page", str(other), "--check")
