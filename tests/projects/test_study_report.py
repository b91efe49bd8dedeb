"""Means, paired differences, gaps and pictures, and the page that is made from a csv of results."""

import numpy as np
import programs
import pytest
from accuracy_study.curves import curve_of
from accuracy_study.page import NO_RESULTS, render
from accuracy_study.statistics import mean_over_seeds, paired_difference
from accuracy_study.tables import score_table, with_error
from PIL import Image
from scipy.special import stdtr
from study_results import ALONE, DISTILLED, PAGE, block, gap_rows, result, run_report, toy_rows, write_results

from mgd_det.errors import UserError


# ------------------------------------------------------------------ statistics
def test_mean_and_standard_error_by_hand():
    # Of 10, 11, 12: variance ((-1)^2 + 0 + 1^2) / 2 = 1, error 1 / sqrt(3).
    mean = mean_over_seeds([10.0, 11.0, 12.0])
    assert (mean.value, mean.n) == (11.0, 3) and mean.error == pytest.approx(0.5773503)
    assert mean_over_seeds([4.0]).error is None


def test_paired_difference_by_hand():
    # Differences 4, 3, 5: mean 4, variance 1, error 1 / sqrt(3), t = 4 sqrt(3) = 6.93 with 2 degrees of freedom.
    found = paired_difference(DISTILLED, ALONE)
    assert found.mean.value == 4.0 and found.mean.n == 3
    assert found.mean.error == pytest.approx(1 / np.sqrt(3))
    assert found.p == pytest.approx(2 * stdtr(2, -4 * np.sqrt(3)))
    # With 2 degrees of freedom, the t distribution has a closed form: p = 1 - t / sqrt(2 + t^2).
    t = 4 * np.sqrt(3)
    assert found.p == pytest.approx(1 - t / np.sqrt(2 + t * t))


def test_pairing_is_by_seed_and_not_by_order():
    shuffled = {3: 17.0, 9: 1000.0, 1: 14.0, 2: 14.0}
    found, ordered = paired_difference(shuffled, ALONE), paired_difference(DISTILLED, ALONE)
    assert found == ordered


def test_no_p_where_none_can_be_given():
    assert paired_difference({1: 2.0}, {2: 1.0}) is None
    assert paired_difference({1: 2.0}, {1: 1.0}).p is None
    assert paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}).p is None  # a difference without variance


def test_times_are_those_of_one_machine():
    gpu = {"device": "cuda", "hardware": "H200", "seconds": 55.0, "cpu_seconds": 54.0}
    rows = [result("alone", 1, 10.0), result("alone", 2, 11.0, **gpu), result("distilled", 2, 14.0, **gpu)]
    _, _, alone, distilled = ([cell.strip() for cell in line.split("|")] for line in score_table(rows).splitlines())
    assert alone[1:5] == ["alone", "2", "600", "120"] and distilled[1:5] == ["distilled", "1", "600", ""]


def test_the_page_has_the_numbers_and_keeps_its_prose(report, page):
    run_report(report, page)
    text = page.read_text()
    for prose in ("# Title\n\nProse above.\n", "Prose between.\n", "Prose below.\n"):
        assert prose in text
    assert "an old table" not in text
    assert "| alone | 3 | 600 | 120 | 11.00 ± 0.58 | 22.00 ± 1.15 | 5.50 ± 0.29 |" in text
    assert "| distilled | 3 | 600 | 120 | 15.00 ± 1.00 |" in text
    assert "| distilled - alone | 3 | +4.00 ± 0.58 | 0.020 |" in text
    assert "| alone | 1 | 600 | 120 | 9.00 | 18.00 | 4.50 |" in text  # on the final set
    assert "![Curves](accuracy_toy.png)" in text
    assert "Scores on val; abacus; torch 2.0." in text
    assert NO_RESULTS in text  # of the other study
    with Image.open(page.parent / "accuracy_toy.png") as picture:
        assert picture.width > 500
    run_report(report, page)
    assert page.read_text() == text


def test_check_fails_where_the_page_is_not_what_the_csv_gives(report, page):
    with pytest.raises(UserError, match="accuracy.md"):
        run_report(report, page, "--check")
    assert page.read_text() == PAGE
    run_report(report, page)
    run_report(report, page, "--check")
    page.write_text(page.read_text().replace("15.00 ±", "16.00 ±"))
    with pytest.raises(UserError, match="accuracy.md"):
        run_report(report, page, "--check")


def test_check_fails_where_a_picture_shows_other_results(report, page):
    write_results(page.parent / "results", toy_rows({**DISTILLED, 3: 18.0}))
    run_report(report, page)
    later = page.read_text()
    old_picture = (page.parent / "accuracy_toy.png").read_bytes()
    write_results(page.parent / "results", toy_rows())
    run_report(report, page)
    assert page.read_text() != later
    (page.parent / "accuracy_toy.png").write_bytes(old_picture)
    with pytest.raises(UserError, match="^[^,]*accuracy_toy.png: "):
        run_report(report, page, "--check")


def test_masks_have_a_column_where_there_are_any(tmp_path):
    write_results(tmp_path / "results", [result("alone", 1, 10.0, mask_AP=8.0), result("plain", 1, 9.0)])
    page = tmp_path / "page.md"
    page.write_text("<!-- results: {study: toy, show: scores} -->\n<!-- end of results -->\n")
    text = render(page, tmp_path / "results", tmp_path).text
    assert "| AP75 | mask AP |" in text and "| 5.00 | 8.00 |" in text and "| 4.50 |  |" in text


def test_a_curve_is_the_mean_where_all_seeds_have_a_value():
    curve = curve_of([result("a", 1, 2.0, "200:1.0 400:2.0"), result("a", 2, 4.0, "200:3.0 400:4.0 500:9.0")])
    assert [(iteration, mean.value) for iteration, mean in curve.items()] == [(200, 2.0), (400, 3.0)]
    assert curve[200].error == pytest.approx(1.0)


@pytest.mark.parametrize(
    "marker, message",
    [
        ("{study: toy, show: tables}", "line 2: show is 'tables'"),
        ("{study: toy, show: scores, sets: val}", "line 2: .*sets: val"),
        ("{study: toy, show: scores, set: vall}", "line 2: .*'vall'.*Did you mean val"),
        ("{study: toy, show: scores, arms: [alon]}", "line 2: .*'alon'.*Did you mean alone"),
        ("{study: toy, show: differences}", "line 2: .*against"),
        ("{study: toy, show: differences, against: [alon]}", "line 2: .*'alon'.*Did you mean alone"),
        ("{study: toy", "line 2: .*yaml"),
    ],
)
def test_a_mistake_in_a_marker_is_named(page, marker, message):
    page.write_text(f"# Title\n<!-- results: {marker} -->\n<!-- end of results -->\n")
    with pytest.raises(UserError, match=f"{page}, {message}"):
        render(page, page.parent / "results", page.parent)


@pytest.mark.parametrize("text", ["no marker", "<!-- results: {study: toy, show: scores} -->\n"])
def test_a_page_whose_markers_are_not_closed_is_refused(page, text):
    page.write_text(text)
    with pytest.raises(UserError, match=f"{page}: 0 of {text.count('<!--')}"):
        render(page, page.parent / "results", page.parent)


def test_a_part_of_a_study_makes_a_page(page):
    study = """
study: toy
seeds: [1]
final: {fashion_scenes: small, seed: 7, images: 9}
arms:
  - {name: alone, config: a.yaml}
  - {name: distilled, config: b.yaml}
  - {name: same_time, like: alone, same_time_as: distilled}
"""
    (page.parent / "toy.yaml").write_text(study)
    markers = [
        "{study: toy, show: differences, against: [same_time, alone]}",
        "{study: toy, show: scores, arms: [distilled, same_time]}",
        "{study: toy, show: scores, arms: [same_time]}",
        "{study: toy, show: scores, set: fashion_scenes_small_seed7_val}",
    ]
    page.write_text("".join(f"<!-- results: {marker} -->\n<!-- end of results -->\n" for marker in markers))
    blocks = render(page, page.parent / "results", page.parent).text.split("<!-- end of results -->\n")
    assert "| distilled - alone |" in blocks[0] and "same_time |" not in blocks[0]
    assert "| distilled |" in blocks[1]
    assert NO_RESULTS in blocks[2] and NO_RESULTS in blocks[3]


def test_errors_are_shown_with_two_decimals():
    assert with_error(mean_over_seeds([1.234])) == "1.23"
    assert with_error(mean_over_seeds([-1.0, -2.0]), signed=True) == "-1.50 ± 0.50"


@pytest.mark.parametrize("page", ["docs/accuracy.md", "docs/accuracy_parts.md", "docs/latency.md", "README.md"])
def test_the_committed_pages_are_what_the_committed_results_give(report, page):
    report.run(report.parse_args(["--check", "--page", str(programs.ROOT / page)]))


GAP = "{study: toy, show: gap, teacher: teacher, pairs: [[short_mgd, short], [long_mgd, long], [long_mgd, best]]}"


def test_the_gap_that_is_closed_by_hand(page):
    write_results(page.parent / "results", gap_rows())
    text = block(page, GAP).text
    # Seeds 1 and 2 have both: 5 of 10 and 6 of 8 AP, so 50 % and 75 %: mean 62.5, error 12.5.
    assert "| short_mgd, short | 2 | 600 | 11.00 ± 1.00 | 16.50 ± 1.50 | 20.00 | 62.50 ± 12.50 % |" in text
    assert "| long_mgd, long | 1 | 1300, 1200 | 16.00 | 21.00 | 20.00 | 125.00 % |" in text  # better than the teacher
    assert "| long_mgd, best | 1 | 1300, 600 | 25.00 | 21.00 | 20.00 | - |" in text  # no gap


def test_gains_by_hand(page):
    same_time = [
        result("same_time", seed, ap, mask_AP=ap + 1, iterations=700) for seed, ap in {2: 13.0, 3: 15.0}.items()
    ]
    distilled = [result("distilled", seed, ap, mask_AP=ap + seed) for seed, ap in DISTILLED.items()]
    write_results(page.parent / "results", [result("alone", *pair) for pair in ALONE.items()] + distilled + same_time)
    text = block(page, "{study: toy, show: gains, pairs: [[distilled, alone], [distilled, same_time]]}").text
    # Differences of 4, 3 and 5: t is 4 sqrt(3).
    p = f"{2 * stdtr(2, -4 * 3**0.5):.3f}"
    assert f"| distilled - alone | 3 | 600 | 11.00 ± 0.58 | 15.00 ± 1.00 | +4.00 ± 0.58 | {p} |" in text
    assert "| distilled - same_time | 2 | 700 | 14.00 ± 1.00 | 15.50 ± 1.50 | +1.50 ± 0.50 | 0.205 |" in text  # t is 3
    text = block(page, "{study: toy, show: gains, score: mask_AP, pairs: [[distilled, same_time]]}").text
    assert "| mask AP alone |" in text and "| 15.00 ± 1.00 | 18.00 ± 2.00 | +3.00 ± 1.00 | 0.205 |" in text


def test_a_gap_that_cannot_be_told_yet(page):
    study = "study: toy\nseeds: [1]\narms:\n  - {name: teacher, config: a.yaml, eval_only: true}\n"
    (page.parent / "toy.yaml").write_text(study + "  - {name: later, config: b.yaml}\n")
    write_results(page.parent / "results", gap_rows()[1:])
    assert NO_RESULTS in block(page, GAP).text
    write_results(page.parent / "results", gap_rows())
    assert NO_RESULTS in block(page, "{study: toy, show: gap, teacher: teacher, pairs: [[later, short]]}").text
    assert NO_RESULTS in block(page, "{study: toy, show: gains, pairs: [[later, short]]}").text
    assert NO_RESULTS in block(page, "{study: toy, show: differences, arms: [short, later], against: [short]}").text
    assert NO_RESULTS in block(page, "{study: toy, show: differences, arms: [short, later], against: [later]}").text


@pytest.mark.parametrize(
    "marker, message",
    [
        ("{study: toy, show: gap, teacher: teacher}", "show: gap needs pairs"),
        ("{study: toy, show: scores, pairs: []}", "show: scores has no pairs; it has study, show, set, arms"),
        ("{study: toy, show: gains, teacher: teacher, pairs: []}", "show: gains has no teacher"),
        ("{study: toy, show: gap, teacher: teacher, pairs: [], score: AP}", "show: gap has no score"),
        ("{study: toy, show: gains, score: AR, pairs: []}", "score is 'AR'"),
        ("{study: toy, show: gains, score: mask_AP, pairs: [[short_mgd, short]]}", "'short_mgd' has no mask AP"),
        ("{study: toy, show: gap, teacher: teacher, pairs: [short]}", r"pairs is \['short'\]"),
        ("{study: toy, show: gap, teacher: teachr, pairs: [[short_mgd, short]]}", "'teachr'.*Did you mean teacher"),
        ("{study: toy, show: gap, teacher: teacher, pairs: [[short_mg, short]]}", "'short_mg'.*Did you mean short_mgd"),
        ("{study: toy, show: latency}", "latency .*latency.csv cannot be read .*--csv"),
    ],
)
def test_a_mistake_about_gap_or_latency_is_named(page, marker, message):
    write_results(page.parent / "results", gap_rows())
    with pytest.raises(UserError, match=f"{page}, line 1: .*{message}"):
        block(page, marker)
