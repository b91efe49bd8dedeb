"""Study files, and the csv of results."""

import dataclasses
import typing

import pytest
from accuracy_study.results import COLUMNS, Result, ResultsFile, overrides_of_text, overrides_text, read_results
from accuracy_study.study import read_study
from study_place import STUDY
from study_results import result

from mgd_det.errors import UserError


def test_overrides_are_arguments_that_a_shell_gives_back():
    overrides = {"MODEL.MGD.INHERIT": ["fpn", "head"], "SOLVER.STEPS": [1, 2], "SOLVER.BASE_LR": 0.1}
    text = overrides_text(overrides)
    assert text == "MODEL.MGD.INHERIT '[\"fpn\", \"head\"]' SOLVER.STEPS '[1, 2]' SOLVER.BASE_LR 0.1"
    assert overrides_of_text(text)["MODEL.MGD.INHERIT"] == '["fpn", "head"]'


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seeds: [1, 2]", "seeds: [1, 1]", r"seeds .*\[1, 1\]"),
        ("seeds: [1, 2]", "seeds: 3", "seeds is 3"),
        ("study: toy", "studie: toy", "studie.*Did you mean study"),
        ("like: alone", "like: alon", "like is 'alon'.*Did you mean alone"),
        ("like: alone, ", "", "'same_time' needs one of config and like"),
        ("same_time_as: distilled", "same_time_as: same_time", "same_time_as is 'same_time'"),
        ("name: distilled", "name: alone", "'alone'"),
        ("name: distilled", "name: a/b", "'a/b'"),
        ("{SOLVER.MAX_ITER: 600", "{SEED: 3, SOLVER.MAX_ITER: 600", "overrides has SEED"),
        ("seeds: [1, 2]", "seeds: [", "cannot be read"),
        ("FPN.yaml}", "FPN.yaml, eval_only: 1}", "'alone': eval_only is 1"),
        ("FPN.yaml}", "FPN.yaml, eval_only: true}", "like is 'alone', which is not trained"),
        ("same_time_as: distilled", "eval_only: true", "'same_time': eval_only is True"),
    ],
)
def test_a_mistake_in_a_study_file_is_named(place, old, new, message):
    assert old in STUDY
    place.write_study(STUDY.replace(old, new))
    with pytest.raises(UserError, match=f"study .*study.yaml.*{message}"):
        read_study(str(place.folder / "study.yaml"))


def test_a_config_key_that_does_not_exist_is_named_before_anything_runs(place):
    place.write_study(STUDY.replace("SOLVER.MAX_ITER", "SOLVER.MAXITER"))
    with pytest.raises(UserError, match="MAXITER"):
        place.runner()
    assert place.calls() == []


def test_a_csv_that_is_no_results_file_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=str(path)):
        ResultsFile(path)
    path.write_text(",".join(COLUMNS) + "\n" + "toy,alone,one" + "," * (len(COLUMNS) - 3) + "\n")
    with pytest.raises(UserError, match=f"{path}, line 2.*one"):
        ResultsFile(path)


def test_a_csv_is_read_when_typing_has_forgotten_its_cache(tmp_path):
    """The alias of a field and one written later are equal, but not always the same object."""
    file = ResultsFile(tmp_path / "a.csv")
    row = Result(**{**dict.fromkeys(COLUMNS, ""), **{n: 1.0 for n in ("AP", "AP50", "AP75")}, "mask_AP": None})
    for name in ("seed", "iterations"):
        row = dataclasses.replace(row, **{name: 1})
    for name in ("seconds", "cpu_seconds", "seconds_per_iteration", "cpu_seconds_per_iteration"):
        row = dataclasses.replace(row, **{name: 1.0})
    file.append(row)
    for clear in typing._cleanups:
        clear()
    assert read_results(tmp_path / "a.csv") == [row]


def test_rows_that_another_run_adds_stay(tmp_path):
    first, second = (ResultsFile(tmp_path / "toy.csv") for _ in range(2))
    first.append(result("alone", 1, 10.0))
    second.append(result("distilled", 1, 20.0))
    first.append(result("alone", 2, 11.0))
    rows = read_results(tmp_path / "toy.csv")
    assert [(row.arm, row.seed) for row in rows] == [("alone", 1), ("distilled", 1), ("alone", 2)]
    assert first.find("distilled", 1, "val") is not None
