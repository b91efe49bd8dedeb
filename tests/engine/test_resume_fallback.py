"""Trainings that resume where the newest checkpoint is damaged."""

import os

import pytest
import torch
import toy
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from fvcore.common.param_scheduler import LinearParamScheduler
from omegaconf import OmegaConf
from saved_state import equal
from torch import nn

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.data import register_coco_folder
from mgd_det.engine import MatchingUpdate, Trainer, lazy_trainer
from mgd_det.errors import UserError


@pytest.fixture
def cfg(tmp_path):
    teacher = toy.save_teacher(tmp_path / "teacher.pth")
    _, annotations, _, images, *_ = toy.write_scenes(tmp_path / "toy", train=4, val=1)
    register_coco_folder("resume_train", annotations, images)
    opts = ["DATASETS.TRAIN", "('resume_train',)", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2"]
    opts += ["SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001", "SOLVER.CHECKPOINT_PERIOD", "1"]
    opts += ["SOLVER.CHECKPOINTS_KEPT", "3", "DATALOADER.NUM_WORKERS", "0", "SEED", "5"]
    yield toy.distilled_config(teacher, opts=[*opts, "OUTPUT_DIR", str(tmp_path / "out")])
    DatasetCatalog.remove("resume_train")


@pytest.mark.slow
def test_a_distilled_training_goes_on_from_the_checkpoint_before(cfg, tmp_path, caplog):
    out = tmp_path / "out"
    out.mkdir()
    Trainer(cfg).train()
    assert sorted(path.name for path in out.glob("*.pth")) == [f"model_000000{i}.pth" for i in (1, 2, 3)] + [
        "model_final.pth"
    ]
    for name in ("model_0000003.pth", "model_final.pth"):
        (out / name).write_bytes((out / name).read_bytes()[:-1000])
    saved = torch.load(out / "model_0000002.pth", weights_only=True)

    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert "model_final.pth: cannot be read" in caplog.text and "Falling back on" in caplog.text
    assert resumed.start_iter == 3
    hook = next(h for h in resumed._hooks if isinstance(h, MatchingUpdate))
    assert equal(dict(resumed.model.state_dict()), dict(saved["model"]))
    assert equal(resumed.optimizer.state_dict(), saved["trainer"]["_trainer"]["optimizer"])
    assert equal(hook.state_dict(), saved["trainer"]["hooks"]["MatchingUpdate"])
    assert equal(resumed.scheduler.state_dict(), saved["trainer"]["hooks"]["LRScheduler"])

    resumed.train()  # and saves over the damaged ones
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    for name, iteration in (("model_0000003.pth", 3), ("model_final.pth", 3)):
        assert torch.load(out / name, weights_only=True)["iteration"] == iteration
    assert len(list(out.glob("model_0*.pth"))) == 3


def checkpointer(folder):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return TrainingCheckpointer(model, str(folder), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def resumed_from(folder):
    """The checkpoint, or the error."""
    subject = checkpointer(folder)
    try:
        rest = subject.resume_or_load("", resume=True)
    except UserError as e:
        return str(e)
    return subject.resumed_from, rest.get("iteration")


def test_all_ranks_resume_from_what_rank_0_finds(tmp_path, run_ranks):
    for folder in ("shared", "torn"):
        (tmp_path / folder).mkdir()
        for iteration in (1, 3):
            checkpointer(tmp_path / folder).save(f"model_000000{iteration}", iteration=iteration)
    (tmp_path / "shared" / "model_0000003.pth").write_bytes(b"torn")
    for name in ("model_0000001.pth", "model_0000003.pth"):
        (tmp_path / "torn" / name).write_bytes(b"torn")
    (tmp_path / "empty").mkdir()

    def ranks(rank):
        torn = resumed_from(tmp_path / "torn")
        own_disk = resumed_from(tmp_path / ("empty" if rank else "shared"))
        none = resumed_from(tmp_path / ("shared" if rank else "empty"))
        return torn, own_disk, none, resumed_from(tmp_path / "shared")

    (torn, own_disk, none, shared), others = run_ranks(ranks, 2)
    assert torn == others[0] and "model_0000003.pth: cannot be read" in torn
    assert "which rank 1 cannot see: give an OUTPUT_DIR" in own_disk
    assert "which rank 1 cannot see: give an OUTPUT_DIR" in others[1]
    assert none == others[2] == ("", None)
    assert shared == others[3] == (os.path.join(tmp_path, "shared", "model_0000001.pth"), 1)


class Plain(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.linear = nn.Linear(3, backbone["width"])

    def forward(self, batch):
        return {"loss": self.linear(batch).square().mean()}


def sgd(params):
    return torch.optim.SGD(params["model"].parameters(), lr=0.1, momentum=0.9)


def lazy_config(folder, end):
    train = dict(device="cpu", amp=dict(enabled=False), ddp={}, seed=1, init_checkpoint="", max_iter=end, eval_period=0)
    train.update(output_dir=str(folder), log_period=99, checkpointer=dict(period=1, max_to_keep=2))
    return OmegaConf.create(
        dict(
            model=L(Plain)(backbone=dict(width=2)),
            dataloader=dict(train=L(batches)()),
            optimizer=L(sgd)(params=dict()),
            lr_multiplier=L(LinearParamScheduler)(start_value=1.0, end_value=0.5),
            train=train,
        ),
        flags={"allow_objects": True},
    )


def batches():
    return [torch.ones(2, 3)] * 9


@pytest.mark.slow
def test_a_lazyconfig_training_falls_back_and_keeps_its_number(tmp_path):
    def weights(name):
        return torch.load(tmp_path / name, weights_only=True)["model"]

    lazy_trainer.train(lazy_config(tmp_path, 4))
    assert sorted(path.name for path in tmp_path.glob("model_0*.pth")) == ["model_0000002.pth", "model_0000003.pth"]
    expected = weights("model_final.pth")
    for name in ("model_0000003.pth", "model_final.pth"):
        (tmp_path / name).write_bytes(b"")
    lazy_trainer.train(lazy_config(tmp_path, 4), resume=True)
    assert equal(dict(weights("model_final.pth")), dict(expected))
    lazy_trainer.train(lazy_config(tmp_path, 6), resume=True)
    assert sorted(path.name for path in tmp_path.glob("model_0*.pth")) == ["model_0000004.pth", "model_0000005.pth"]
