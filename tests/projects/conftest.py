"""What the tests of studies share."""

import programs
import pytest
from study_place import Place
from study_results import PAGE, toy_rows, write_results


@pytest.fixture(scope="module")
def report():
    return programs.load("projects/AccuracyStudy/report.py")


@pytest.fixture
def page(tmp_path):
    write_results(tmp_path / "results", toy_rows())
    path = tmp_path / "accuracy.md"
    path.write_text(PAGE)
    return path


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)
