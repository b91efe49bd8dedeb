"""The writer to Weights & Biases, with a stand-in for its package."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import toy
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter
from omegaconf import OmegaConf

from mgd_det.engine import Trainer, lazy_trainer
from mgd_det.engine.wandb_writer import WandbWriter
from mgd_det.errors import UserError


@pytest.fixture
def wandb(monkeypatch):
    """What the stand-in was called with."""
    calls = SimpleNamespace(init=None, logged=[], finished=0)

    def init(**options):
        calls.init = options
        return SimpleNamespace(
            log=lambda values, step: calls.logged.append((step, values)),
            finish=lambda: setattr(calls, "finished", calls.finished + 1),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return calls


def test_it_writes_what_detectron2s_json_writer_writes(wandb, tmp_path):
    writer = WandbWriter("project", "name", folder="out", config={"SEED": 1})
    assert isinstance(writer, EventWriter)
    assert wandb.init == {"project": "project", "name": "name", "dir": "out", "config": {"SEED": 1}}
    json_writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(0) as storage:
        for iteration in range(4):
            storage.iter = iteration
            storage.put_scalar("total_loss", [5.0, 1.0, 3.0, 8.0][iteration])
            if iteration == 1:
                storage.put_scalar("bbox/AP", 7.5, smoothing_hint=False)
            if iteration in (2, 3):
                for each in (writer, json_writer):
                    each.write()
                    each.write()  # nothing is written twice
    writer.close(), json_writer.close()
    # The median of the losses so far; a score under the iteration of its evaluation.
    assert wandb.logged == [(1, {"bbox/AP": 7.5}), (2, {"total_loss": 3.0}), (3, {"total_loss": 4.0})]
    assert wandb.finished == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert sorted((row.pop("iteration"), tuple(row.items())) for row in rows) == [
        (step, tuple(values.items())) for step, values in wandb.logged
    ]


def test_without_the_package_a_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="WANDB.ENABLED .*pip install wandb"):
        WandbWriter("project", folder="out")


@pytest.mark.parametrize("value", [True, "project", ["project"]])
def test_an_entry_of_a_lazyconfig_that_is_no_dict_is_named_before_anything_is_built(value):
    with pytest.raises(UserError, match=f"train.wandb is {re.escape(repr(value))}.*WandbWriter"):
        lazy_trainer.train(OmegaConf.create({"train": {"wandb": value}}))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_key_adds_it_to_detectron2s_writers(wandb, tmp_path, enabled):
    cfg = toy.plain_config(opts=["WANDB.ENABLED", enabled, "WANDB.NAME", "mine", "OUTPUT_DIR", str(tmp_path)])
    writers = Trainer.build_writers(SimpleNamespace(cfg=cfg, max_iter=5))
    assert [type(writer).__name__ for writer in writers[:3]] == [
        "CommonMetricPrinter",
        "JSONWriter",
        "TensorboardXWriter",
    ]
    assert [type(writer) for writer in writers[3:]] == [WandbWriter] * enabled
    if enabled:
        assert (wandb.init["name"], wandb.init["dir"]) == ("mine", str(tmp_path))
        assert wandb.init["config"]["WANDB"]["ENABLED"] is True
