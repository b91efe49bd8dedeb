"""Outputs are checked before the work starts."""

import os

import pytest

from mgd_det.errors import UserError
from mgd_det.files.outputs import writable_file, writable_folder, writing


def test_a_folder_is_created_and_left_empty(tmp_path):
    path = str(tmp_path / "new" / "deep")
    assert writable_folder(path, "--output-dir") == path
    assert os.listdir(path) == []


def test_a_file_keeps_its_content_and_no_other_stays(tmp_path):
    path = tmp_path / "report.json"
    assert writable_file(str(path), "--output") == str(path)
    assert os.listdir(tmp_path) == []
    path.write_text("old")
    writable_file(str(path), "--output")
    assert path.read_text() == "old"


@pytest.mark.parametrize("check", [writable_folder, writable_file])
def test_a_place_below_a_file(tmp_path, check):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--flag {tmp_path}/file/x "):
        check(str(tmp_path / "file" / "x"), "--flag")
    with pytest.raises(UserError, match="--flag"):
        writable_file(str(tmp_path), "--flag")


def test_a_file_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=f"^--output .* there is no folder {tmp_path}/new. Make it first"):
        writable_file(str(tmp_path / "new" / "report.json"), "--output")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(UserError, match=f"--output-dir {tmp_path} .*Permission denied"):
        writable_folder(str(tmp_path), "--output-dir")


def test_only_errors_of_the_system_are_translated():
    with pytest.raises(UserError, match="OUTPUT_DIR out .*disk full"), writing("out", "OUTPUT_DIR"):
        raise OSError("disk full")
    with pytest.raises(ZeroDivisionError), writing("out", "OUTPUT_DIR"):
        raise ZeroDivisionError
