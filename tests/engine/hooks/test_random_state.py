"""A training that was interrupted ends with the weights of one that was not, bit by bit."""

import logging
import random
import re
import shutil

import numpy as np
import pytest
import torch
import toy
from detectron2.data import build_detection_train_loader
from detectron2.engine import HookBase, SimpleTrainer, hooks

from mgd_det import model_zoo
from mgd_det.engine import Trainer, lazy_trainer
from mgd_det.engine.hooks.random_state import RandomState

DONE, END = 2, 4  # iterations of the checkpoint that is resumed, and of the whole training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with toy.registered_scenes(tmp_path_factory.mktemp("scenes") / "toy", "random_state", train=12) as overrides:
        yield overrides


@pytest.fixture
def opts(data, tmp_path):
    opts = [
        *data,
        "SOLVER.IMS_PER_BATCH",
        "2",
        "SOLVER.MAX_ITER",
        str(END),
        "SOLVER.STEPS",
        "()",
        "SOLVER.BASE_LR",
        "0.002",
    ]
    opts += [
        "SOLVER.CHECKPOINT_PERIOD",
        str(DONE),
        "DATALOADER.NUM_WORKERS",
        "0",
        "OUTPUT_DIR",
        str(tmp_path / "whole"),
    ]
    return [*opts, "INPUT.CROP.ENABLED", "True", "INPUT.MIN_SIZE_TRAIN", "(64, 80)"]


class Recorder(HookBase):
    """The draws of each step before the model's: of generators that a hook before this one has seeded."""

    def __init__(self):
        self.draws = {}

    def before_step(self):
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.draws[self.trainer.iter] = random.random(), float(np.random.rand()), float(torch.rand(1))
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def train(cfg, resume=False, start=0):
    """Trains from generators in any state, which nothing of a resumed training may come from."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(start)
    trainer = Trainer(cfg)
    recorder = Recorder()
    trainer.register_hooks([recorder])
    trainer.resume_or_load(resume=resume)
    assert trainer.start_iter == (DONE if resume else 0)
    trainer.train()
    return trainer, recorder.draws


def continued(cfg, folder, *opts):
    """The same after the checkpoint of DONE iterations, in another folder."""
    folder.mkdir()
    name = f"model_{DONE - 1:07d}.pth"
    shutil.copy(f"{cfg.OUTPUT_DIR}/{name}", folder)
    (folder / "last_checkpoint").write_text(name)
    cfg = cfg.clone()
    cfg.merge_from_list(["OUTPUT_DIR", str(folder), *opts])
    return train(cfg, resume=True, start=99)


def assert_equal_trainings(whole, resumed):
    for a, b in zip(states(whole), states(resumed)):
        assert_equal(a, b)


def states(trainer):
    trainer_state = trainer.state_dict()
    return trainer.model.state_dict(), trainer_state["_trainer"]["optimizer"], trainer_state["hooks"]


def assert_equal(a, b, path=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{path}.{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


@pytest.mark.slow
@pytest.mark.parametrize("source", ["measured", "online"])
def test_distilled_retinanet(source, opts, tmp_path, monkeypatch):
    """With a matching update that is due at the resume, batch norm, and a worker where there was none."""
    weights = toy.save_teacher(tmp_path / "teacher.pth")
    cfg = toy.distilled_config(weights, student="mobilenetv2", opts=[*opts, "SEED", "5"])
    cfg.MODEL.MGD.MATCHING.PERIODS, cfg.MODEL.MGD.MATCHING.SOURCE = [DONE], source
    build, seeds = Trainer.build_train_loader.__func__, []
    monkeypatch.setattr(
        Trainer, "build_train_loader", classmethod(lambda cls, cfg: seeds.append(cfg.SEED) or build(cls, cfg))
    )
    whole, _ = train(cfg)
    # Training's own, and those of the updates that measure: each does so on images of its own.
    drawn = list(seeds)
    assert drawn[0] == 5 and len(drawn) == len(set(drawn)) == (3 if source == "measured" else 1)
    resumed, _ = continued(cfg, tmp_path / "resumed", "DATALOADER.NUM_WORKERS", "1")
    assert_equal_trainings(whole, resumed)
    assert seeds[len(drawn) :] == [5, *drawn[2:]]


@pytest.mark.slow
def test_two_ranks_with_batch_norm(opts, tmp_path, run_ranks):
    """Rank 0 alone saves: what rank 1 has of its own must be saved with it, or make no difference."""
    weights = toy.save_teacher(tmp_path / "teacher.pth")
    cfg = toy.distilled_config(weights, opts=[*opts, "SEED", "5", "SOLVER.IMS_PER_BATCH", "4"])
    cfg.MODEL.MGD.MATCHING.PERIODS = [3]

    def saved(trainer):
        return [states(trainer), trainer.model.module.loss_normalizer]

    whole = run_ranks(lambda rank: saved(train(cfg)[0]), 2)
    (tmp_path / "resumed").mkdir()
    name = f"model_{DONE - 1:07d}.pth"
    shutil.copy(f"{cfg.OUTPUT_DIR}/{name}", tmp_path / "resumed")
    (tmp_path / "resumed" / "last_checkpoint").write_text(name)
    cfg.OUTPUT_DIR = str(tmp_path / "resumed")
    resumed = run_ranks(lambda rank: saved(train(cfg, resume=True, start=99)[0]), 2)
    assert_equal(whole[0], resumed[0])
    assert whole[1][1] == resumed[1][1] != whole[0][1]


@pytest.mark.slow
def test_mask_rcnn_which_draws_the_proposals_it_trains_on(opts, tmp_path):
    """Unseeded, and of two batches a step."""
    cfg = toy.plain_config(toy.RCNN, "mobilenetv2", [*opts, "SOLVER.ACCUMULATE", "2", "SEED", "-1"])
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 4
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    whole, draws = train(cfg)
    resumed, draws_after = continued(cfg, tmp_path / "resumed")
    assert_equal_trainings(whole, resumed)
    assert draws_after == {i: draws[i] for i in range(DONE, END)} and len(set(draws.values())) == END


@pytest.mark.slow
def test_precise_batch_norm_goes_on_with_its_own_images(opts, tmp_path):
    precise = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.EVAL_PERIOD", "1"]
    cfg = toy.plain_config(student="mobilenetv2", opts=[*opts, "SEED", "5", *precise])
    cfg.TEST.PRECISE_BN.NUM_ITER = 2
    whole, _ = train(cfg)
    assert any(isinstance(hook, hooks.PreciseBN) for hook in whole._hooks)
    resumed, _ = continued(cfg, tmp_path / "resumed")
    assert_equal_trainings(whole, resumed)


def lazy_config(folder):
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py")
    cfg.model.backbone = cfg.model.backbone.student
    cfg.model.backbone.out_channels = 16
    cfg.model.head.conv_dims = [16]
    cfg.model.head.input_shape = [{"_target_": "detectron2.layers.ShapeSpec", "channels": 16}] * 5
    cfg.dataloader.train.dataset.names = "random_state"
    cfg.dataloader.train.mapper.augmentations = cfg.dataloader.train.mapper.augmentations[1:]  # flips
    cfg.dataloader.train.num_workers = 0
    cfg.dataloader.train.total_batch_size = 2
    del cfg.dataloader.evaluator
    cfg.train.update(device="cpu", init_checkpoint="", max_iter=END, eval_period=0, output_dir=str(folder))
    cfg.train.checkpointer.period = DONE
    return cfg


@pytest.mark.slow
def test_a_lazy_config(data, tmp_path):
    """Unseeded, with Detectron2's loader, in whose place ours is."""
    cfg = lazy_config(tmp_path / "whole")
    assert cfg.dataloader.train._target_ is build_detection_train_loader and "seed" not in cfg.train
    for resume, folder in ((False, "whole"), (True, "resumed")):
        cfg = lazy_config(tmp_path / folder)
        (tmp_path / folder).mkdir()
        if resume:
            name = f"model_{DONE - 1:07d}.pth"
            shutil.copy(tmp_path / "whole" / name, tmp_path / folder)
            (tmp_path / folder / "last_checkpoint").write_text(name)
        np.random.seed(resume)
        torch.manual_seed(resume)
        lazy_trainer.train(cfg, resume=resume)
    whole, resumed = (torch.load(tmp_path / folder / "model_final.pth") for folder in ("whole", "resumed"))
    assert_equal(whole, resumed)


def steps(trainer_hooks, loader=(), start=0, end=3):
    model = torch.nn.Linear(1, 1)
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.run_step = lambda: None
    trainer.register_hooks(trainer_hooks)
    trainer.train(start, end)


def test_ranks_and_iterations_draw_otherwise(monkeypatch):
    draws = []
    for rank in (0, 1, 0):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        recorder = Recorder()
        steps([RandomState(4), recorder])
        draws.append(recorder.draws)
    assert draws[0] == draws[2]
    for generator in range(3):
        assert len({x[generator] for rank in draws[:2] for x in rank.values()}) == 6


class Loader(list):
    starts = ()

    def __init__(self, total_batch_size=4):
        self.total_batch_size = total_batch_size

    def start_at(self, batch, seed, earlier=()):
        self.starts += ((batch, seed, *earlier),)


def test_the_loader_starts_at_the_iteration_by_the_saved_seed(caplog):
    loader = Loader()
    steps([RandomState(4, batches_per_iteration=3)], loader)
    resumed = RandomState(8, batches_per_iteration=3)
    with caplog.at_level(logging.INFO, "mgd_det"):
        resumed.load_state_dict(RandomState(4).state_dict())
        steps([resumed], loader, start=2)
    assert loader.starts == ((0, 4), (6, 4))
    assert len(re.findall("seed 4", caplog.text)) == 2 and "batch 6 of seed 4" in caplog.text


def test_steps_of_another_size_continue_after_the_images_seen(caplog):
    """Two changes: of the images of a batch, and of the batches of a step."""
    state = {"seed": 4}
    starts = []
    for accumulate, size, start in ((3, 4, 0), (3, 8, 2), (1, 8, 5), (1, 8, 6)):
        loader, hook = Loader(size), RandomState(4, accumulate)
        with caplog.at_level(logging.WARNING, "mgd_det"):
            caplog.clear()
            hook.load_state_dict(state)
            steps([hook], loader, start=start, end=start + 1)
        state = hook.state_dict()
        starts += loader.starts
        said = caplog.text
        assert bool(said) == (start in (2, 5))
        if start == 5:
            # 2 steps of 3 x 4 images and 3 steps of 3 x 8
            assert "ACCUMULATE (train.accumulate) is 1" in said and "were 3 and 8" in said and "96 images" in said
    assert starts == [(0, 4), (0, 4, (6, 4)), (0, 4, (6, 4), (9, 8)), (1, 4, (6, 4), (9, 8))]


def test_accumulation_alone_counts_batches():
    state = RandomState(4, 2)
    steps([state], Loader(), end=3)
    loader, hook = Loader(), RandomState(4, 5)
    hook.load_state_dict(state.state_dict())
    steps([hook], loader, start=3, end=4)
    assert loader.starts == ((6, 4),)


def test_a_checkpoint_of_version_0_1_tells_no_batch_size(caplog):
    loader, hook = Loader(16), RandomState(9)
    hook.load_state_dict({"seed": 4})
    with caplog.at_level(logging.WARNING, "mgd_det"):
        steps([hook], loader, start=2)
    assert "IMS_PER_BATCH 16" in caplog.text and loader.starts == ((2, 4),)


@pytest.mark.slow
def test_a_resume_with_another_batch_size_passes_over_no_image(opts, tmp_path):
    """The images of 2 steps of 2 and then of 2 steps of 4 are the first 12 of the order, the whole set of 12."""
    opts = [*opts, "SEED", "5", "INPUT.CROP.ENABLED", "False", "DATALOADER.ASPECT_RATIO_GROUPING", "False"]
    cfg = toy.plain_config(student="mobilenetv2", opts=opts)
    seen = []

    class Seen(HookBase):
        def before_train(self):
            run_model = self.trainer.model.forward
            self.trainer.model.forward = lambda batch: seen.append([x["image_id"] for x in batch]) or run_model(batch)

    for resume, size, end in ((False, 2, DONE), (True, 4, END)):
        cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", size, "SOLVER.MAX_ITER", end])
        trainer = Trainer(cfg)
        trainer.register_hooks([Seen()])
        trainer.resume_or_load(resume=resume)
        trainer.train()
    assert [len(batch) for batch in seen] == [2, 2, 4, 4]
    assert len({image for batch in seen for image in batch}) == 12


def test_a_checkpoint_without_a_seed_and_a_loader_that_starts_anew_are_logged(caplog):
    with caplog.at_level(logging.INFO, "mgd_det"):
        steps([RandomState(4)])
        assert not [r for r in caplog.records if r.name.startswith("mgd_det")]
        steps([RandomState(4)], start=2)
    no_seed, from_start = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "seed 4" in no_seed and "tuple" in from_start
