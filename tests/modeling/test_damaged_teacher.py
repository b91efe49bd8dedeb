"""A teacher whose file of weights was cut short, as by a download or a copy that ended early."""

import pytest
import toy
from detectron2.modeling import build_model

from mgd_det.errors import UserError


def test_a_teacher_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "teacher.pth"
    toy.save_teacher(path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"weights {path}: cannot be read as a checkpoint"):
        build_model(toy.distilled_config(str(path)))
