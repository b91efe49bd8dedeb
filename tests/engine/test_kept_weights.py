"""The averaged and the best weights of whole trainings, by yaml config and by LazyConfig."""

import json

import pytest
import torch
import toy
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from fvcore.common.param_scheduler import LinearParamScheduler
from omegaconf import OmegaConf
from torch import nn

from mgd_det.config import plain_student_config
from mgd_det.data import register_coco_folder
from mgd_det.engine import Trainer, lazy_trainer
from mgd_det.engine.hooks.best_checkpoint import BestCheckpoint
from mgd_det.engine.hooks.ema import EMAHook
from mgd_det.engine.trainer import scale_own_schedules
from mgd_det.errors import UserError

KEPT = ["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.5", "SOLVER.EMA.START", "1"]
KEPT += ["TEST.BEST.METRIC", "ema/bbox/AP"]


@pytest.fixture
def opts(tmp_path):
    _, annotations, _, images, *_ = toy.write_scenes(tmp_path / "toy", train=4, val=2)
    register_coco_folder("kept_train", annotations, images)
    opts = ["DATASETS.TRAIN", "('kept_train',)", "DATASETS.TEST", "('kept_train',)", "SOLVER.IMS_PER_BATCH", "2"]
    opts += ["SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001", "SOLVER.CHECKPOINT_PERIOD", "2"]
    opts += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "64"]
    yield [*opts, "DATALOADER.NUM_WORKERS", "0", "SEED", "5", "OUTPUT_DIR", str(tmp_path / "out")]
    DatasetCatalog.remove("kept_train")
    MetadataCatalog.remove("kept_train")


@pytest.fixture
def scored(monkeypatch):
    """Sets the scores of a yaml training: one for each evaluation, in their order. Real ones take longer."""

    def score(*scores):
        left = list(scores)
        monkeypatch.setattr(Trainer, "test", classmethod(lambda *_: {"bbox": {"AP": left.pop(0)}}))

    return score


def load(path):
    return torch.load(path, weights_only=True)


def train(cfg, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_a_distilled_student_leaves_both_as_plain_checkpoints(opts, scored, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    teacher = toy.save_teacher(tmp_path / "teacher.pth")
    cfg = toy.distilled_config(teacher, student="mobilenetv3_small", opts=[*opts, *KEPT, "TEST.EVAL_PERIOD", "1"])
    # Iteration 0 has no average yet; then the average is evaluated first.
    scored(1.0, 3.0, 2.0, 9.0, 8.0, 5.0, 4.0)
    trainer = train(cfg)
    assert trainer._last_eval_results == {"bbox": {"AP": 4.0}, "ema": {"bbox": {"AP": 5.0}}}
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert lines[-1]["bbox/AP"] == 4.0 and lines[-1]["ema/bbox/AP"] == 5.0

    student = build_model(plain_student_config(cfg))
    for name, iteration in (("model_ema.pth", 3), ("model_best.pth", 2)):
        file = load(out / name)
        assert list(file["model"]) == list(student.state_dict()) and file["iteration"] == iteration
        DetectionCheckpointer(student).load(str(out / name))
        assert all(torch.equal(file["model"][key], tensor) for key, tensor in student.state_dict().items())
    expected = load(out / "model_ema.pth")["model"]

    # A resume from the middle ends with the same average.
    for name in ("model_ema.pth", "model_final.pth", "model_0000003.pth"):
        (out / name).unlink()
    (out / "last_checkpoint").write_text("model_0000001.pth")
    scored(9.0, 8.0, 5.0, 4.0)
    assert train(cfg, resume=True).start_iter == 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(out / "model_ema.pth")["model"].items())
    assert load(out / "model_best.pth")["score"] == 9.0


def test_keys_that_are_off_cost_no_hook_and_wrong_ones_are_named(opts, tmp_path):
    (tmp_path / "out").mkdir()
    hooks = Trainer(toy.plain_config(opts=opts))._hooks
    assert not any(isinstance(hook, (EMAHook, BestCheckpoint)) for hook in hooks)
    for more, message in (
        (["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "1.5"], "^SOLVER.EMA.DECAY is 1.5"),
        (["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.START", "4"], "^SOLVER.EMA.START is 4"),
        (["TEST.BEST.METRIC", "AP50"], "^TEST.BEST.METRIC is 'AP50'"),
        (["TEST.BEST.METRIC", "ema/bbox/AP"], "^TEST.BEST.METRIC is 'ema/bbox/AP'.* SOLVER.EMA.ENABLED"),
        (["TEST.BEST.METRIC", "bbox/AP", "DATASETS.TEST", "()"], "^TEST.BEST.METRIC is 'bbox/AP', but DATASETS.TEST"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(toy.plain_config(opts=[*opts, *more]))


def test_a_plain_students_config_has_neither_key():
    plain = plain_student_config(toy.plain_config(opts=KEPT))
    assert "EMA" not in plain.SOLVER and "BEST" not in plain.TEST


def test_the_average_is_scaled_as_the_iterations_are():
    cfg = toy.plain_config(opts=["SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.EMA.START", "100"])
    cfg.SOLVER.EMA.DECAY = 0.99  # reaches back over 100 steps
    scaled, same = scale_own_schedules(cfg, 2).SOLVER.EMA, scale_own_schedules(cfg, 8).SOLVER.EMA
    assert (scaled.START, same.START, same.DECAY) == (400, 100, 0.99)
    assert 1 / (1 - scaled.DECAY) == pytest.approx(400)
    assert 0 < scale_own_schedules(cfg, 2048).SOLVER.EMA.DECAY < 1


@pytest.mark.parametrize("start, scaled", [(99, 24), (60, 15), (100, 25)])
def test_the_average_starts_within_the_training_if_it_did(start, scaled):
    cfg = toy.plain_config(opts=["SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.MAX_ITER", "100"])
    cfg.SOLVER.EMA.START = start
    assert scale_own_schedules(cfg, 4).SOLVER.EMA.START == scaled


@pytest.mark.parametrize("stop, scaled", [(0, 0), (800, 6400)])
def test_the_end_of_distillation_is_scaled_as_the_iterations_are(stop, scaled):
    cfg = toy.plain_config(opts=["SOLVER.REFERENCE_WORLD_SIZE", "8", "MODEL.MGD.STOP_ITER", str(stop)])
    assert scale_own_schedules(cfg, 1).MODEL.MGD.STOP_ITER == scaled


class Plain(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.linear = nn.Linear(3, backbone["width"])

    def forward(self, batch):
        return {"loss": self.linear(batch).square().mean()} if self.training else [{}]


class Scored(DatasetEvaluator):
    scores = []

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"bbox": {"AP": self.scores.pop(0)}}


def sgd(params):
    return torch.optim.SGD(params["model"].parameters(), lr=0.1, momentum=0.9)


def batches():
    return [torch.ones(2, 3)] * 9


def lazy_config(folder, **train):
    options = dict(device="cpu", amp=dict(enabled=False), ddp={}, seed=1, init_checkpoint="", max_iter=4)
    options.update(output_dir=str(folder), log_period=99, checkpointer=dict(period=2, max_to_keep=9), eval_period=1)
    return OmegaConf.create(
        dict(
            model=L(Plain)(backbone=dict(width=2)),
            dataloader=dict(train=L(batches)(), test=L(batches)(), evaluator=L(Scored)()),
            optimizer=L(sgd)(params=dict()),
            lr_multiplier=L(LinearParamScheduler)(start_value=1.0, end_value=0.5),
            train={"report": {"enabled": False}, **options, **train},
        ),
        flags={"allow_objects": True},
    )


def test_a_lazyconfig_has_both(tmp_path):
    keys = dict(ema=dict(decay=0.5, start=1), best=dict(metric="bbox/AP"))
    Scored.scores = [1.0, 0.0, 3.0, 0.0, 9.0, 0.0, 2.0]
    lazy_trainer.train(lazy_config(tmp_path, **keys))
    assert Scored.scores == []
    best, ema = load(tmp_path / "model_best.pth"), load(tmp_path / "model_ema.pth")
    assert (best["score"], best["iteration"], ema["iteration"]) == (9.0, 2, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["bbox/AP"] == 2.0 and lines[-1]["ema/bbox/AP"] == 0.0

    for name in ("model_ema.pth", "model_final.pth", "model_0000003.pth"):
        (tmp_path / name).unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    Scored.scores = [0.0, 9.0, 0.0, 2.0]
    lazy_trainer.train(lazy_config(tmp_path, **keys), resume=True)
    resumed = load(tmp_path / "model_ema.pth")["model"]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in ema["model"].items())
    assert load(tmp_path / "model_best.pth")["score"] == 9.0


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(ema=dict(decay=2)), "^train.ema.decay is 2"),
        (dict(ema=dict(start=7)), "^train.ema.start is 7"),
        (dict(ema=dict(enabled=True)), "^train.ema is .*enabled"),
        (dict(best=dict(metric="ema/bbox/AP")), "^train.best.metric is 'ema/bbox/AP'"),
        (dict(best=dict()), "^train.best is .*metric"),
        (dict(ema=True), "^train.ema is True; .*dict"),
        (dict(best="bbox/AP"), "^train.best is 'bbox/AP'; .*dict"),
    ],
)
def test_wrong_entries_of_a_lazyconfig_are_named(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        lazy_trainer.train(lazy_config(tmp_path, **keys))


def test_a_best_score_needs_an_evaluator(tmp_path):
    cfg = lazy_config(tmp_path, best=dict(metric="bbox/AP"))
    del cfg.dataloader["evaluator"]
    with pytest.raises(UserError, match="^train.best is .*'bbox/AP'.* dataloader.evaluator"):
        lazy_trainer.train(cfg)


def test_none_is_off_in_a_lazyconfig(tmp_path):
    Scored.scores = [1.0]
    lazy_trainer.train(lazy_config(tmp_path, ema=None, best=None, max_iter=1))
    assert Scored.scores == []
    assert not (tmp_path / "model_ema.pth").exists() and not (tmp_path / "model_best.pth").exists()


@pytest.mark.slow
def test_a_training_that_was_stopped_before_its_last_evaluation_gets_it_by_a_resume(opts, scored, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    more = [
        "SOLVER.MAX_ITER",
        "1",
        "SOLVER.EMA.ENABLED",
        "True",
        "TEST.BEST.METRIC",
        "bbox/AP",
        "TEST.EVAL_PERIOD",
        "0",
    ]
    cfg = toy.plain_config(opts=[*opts, *more])
    scored()  # the first evaluation fails: there is no score left
    with pytest.raises(IndexError):
        train(cfg)
    expected = load(out / "model_ema.pth")["model"]
    (out / "model_ema.pth").unlink()
    assert not (out / "model_best.pth").exists()

    scored(3.0, 2.0)
    assert train(cfg, resume=True)._last_eval_results == {"bbox": {"AP": 2.0}, "ema": {"bbox": {"AP": 3.0}}}
    line = json.loads((out / "metrics.json").read_text().splitlines()[-1])
    assert (line["iteration"], line["bbox/AP"]) == (1, 2.0)
    assert (load(out / "model_best.pth")["score"], load(out / "model_best.pth")["iteration"]) == (2.0, 1)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(out / "model_ema.pth")["model"].items())


def test_so_does_that_of_a_lazyconfig(tmp_path):
    Scored.scores = []
    with pytest.raises(IndexError):
        lazy_trainer.train(lazy_config(tmp_path, best=dict(metric="bbox/AP"), max_iter=1))
    Scored.scores = [2.0]
    lazy_trainer.train(lazy_config(tmp_path, best=dict(metric="bbox/AP"), max_iter=1), resume=True)
    assert Scored.scores == []
    assert (load(tmp_path / "model_best.pth")["score"], load(tmp_path / "model_best.pth")["iteration"]) == (2.0, 1)
