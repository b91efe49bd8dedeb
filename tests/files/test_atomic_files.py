"""Folders that appear whole or not at all. For files, see tests/checkpoint/test_training_checkpointer.py."""

import os
from pathlib import Path

import pytest

from mgd_det.files.atomic_files import atomic_folder


def fill(path, text):
    with atomic_folder(path) as folder:
        assert not any(folder.iterdir())
        assert not path.exists() or (path / "a.txt").read_text() != text
        (folder / "a.txt").write_text(text)


def test_it_appears_and_is_replaced(tmp_path):
    for text in ("first", "second"):
        fill(tmp_path / "new" / "set", text)
        assert (tmp_path / "new" / "set" / "a.txt").read_text() == text
        assert os.listdir(tmp_path / "new") == ["set"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_all_is_as_before(tmp_path, error):
    fill(tmp_path / "set", "first")
    with pytest.raises(error):
        with atomic_folder(tmp_path / "set") as folder:
            (folder / "b.txt").write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["set"] and os.listdir(tmp_path / "set") == ["a.txt"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    fill(tmp_path / "set", "first")
    rename = Path.rename

    def fail(self, target):
        if "partial" in self.name:
            raise OSError("disk error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk error"):
        fill(tmp_path / "set", "second")
    assert os.listdir(tmp_path) == ["set"] and (tmp_path / "set" / "a.txt").read_text() == "first"
