"""Trainings whose student starts from its teacher's FPN and head, and resumed ones, which do not start again."""

import shutil

import pytest
import torch
import toy
from detectron2.modeling import build_model
from inheriting import loaded, overrides, plain_config

from mgd_det.engine import Trainer
from mgd_det.errors import UserError


@pytest.fixture
def opts(data, tmp_path):
    return overrides(data, tmp_path / "whole")


def config(kind, teacher, opts):
    return plain_config(teacher, opts) if kind == "plain" else toy.distilled_config(teacher, opts=opts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "distilled"])
def test_a_training_starts_from_its_weights_and_then_from_the_teacher(kind, teacher, opts, tmp_path):
    torch.manual_seed(3)
    own = {name: value.clone() for name, value in build_model(toy.plain_config()).state_dict().items()}
    torch.save({"model": own}, tmp_path / "own.pth")
    trainer = loaded(config(kind, teacher, [*opts, "MODEL.WEIGHTS", str(tmp_path / "own.pth")]))
    file, count = torch.load(teacher)["model"], 0
    for name, value in trainer.model.state_dict().items():
        inherited = not name.startswith("backbone.bottom_up.") and file[name].shape == value.shape
        count += inherited
        assert torch.equal(value.cpu(), (file if inherited else own)[name]), name
    assert count > 20
    assert trainer.start_iter == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "distilled"])
def test_a_resumed_training_does_not_inherit_again(kind, teacher, opts, tmp_path, caplog):
    whole = loaded(config(kind, teacher, opts))
    whole.train()
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000001.pth", part)
    (part / "last_checkpoint").write_text("model_0000001.pth")
    saved = torch.load(part / "model_0000001.pth")["model"]
    assert not torch.equal(saved["head.cls_score.weight"], torch.load(teacher)["model"]["head.cls_score.weight"])

    caplog.clear()
    resumed = loaded(config(kind, teacher, [*opts, "OUTPUT_DIR", str(part)]), resume=True)
    assert resumed.start_iter == 2
    assert all(torch.equal(value, saved[name]) for name, value in resumed.model.state_dict().items())
    assert "starts from these tensors" not in caplog.text
    resumed.train()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_resume_without_a_checkpoint_is_a_start(teacher, opts):
    trainer = loaded(config("plain", teacher, opts), resume=True)
    file = torch.load(teacher)["model"]
    assert torch.equal(trainer.model.head.cls_score.weight.cpu(), file["head.cls_score.weight"])


def test_mistakes_end_before_the_model_is_built(teacher, opts, monkeypatch):
    monkeypatch.setattr(Trainer, "build_model", lambda cfg: pytest.fail("built"))
    for more, message in (
        (["MODEL.MGD.INHERIT", "['neck']"], r"MODEL.MGD.INHERIT is \['neck'\]"),
        (["MODEL.MGD.TEACHER.CONFIG_FILE", ""], "MODEL.MGD.TEACHER.CONFIG_FILE is empty"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(toy.plain_config(opts=[*opts, *more]))
