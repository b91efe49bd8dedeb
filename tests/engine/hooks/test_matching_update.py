import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from detectron2.data import DatasetCatalog
from detectron2.engine import hooks
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mgd_det.data import register_coco_folder
from mgd_det.distillation import Distiller
from mgd_det.engine import MatchingUpdate, Trainer
from mgd_det.engine.matching_schedule import MatchingSchedule
from mgd_det.errors import ArgumentError, UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    _, train_json, _, train_images, _, val_json, _, val_images = toy.write_scenes(
        tmp_path_factory.mktemp("scenes") / "toy"
    )
    register_coco_folder("hook_train", train_json, train_images)
    register_coco_folder("hook_val", val_json, val_images)
    yield ["DATASETS.TRAIN", "('hook_train',)", "DATASETS.TEST", "('hook_val',)"]
    for name in ("hook_train", "hook_val"):
        DatasetCatalog.remove(name)


@pytest.fixture
def cfg(teacher, data, tmp_path):
    opts = [*data, "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", "3", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path), "SEED", "5"]
    opts += ["MODEL.MGD.MATCHING.SOURCE", "measured"]  # the other is tested in test_online_matching.py
    return toy.distilled_config(teacher, opts=opts)


def seeded_trainer(cfg, kind=Trainer):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    return kind(cfg)


def count_updates(monkeypatch):
    """Iterations of the updates that run from here on."""
    updates = []
    original = MatchingUpdate._solve
    monkeypatch.setattr(
        MatchingUpdate, "_solve", lambda self, *a: (updates.append(self.trainer.iter), original(self, *a))
    )
    return updates


def schedule(periods, milestones, end):
    made, iterations = MatchingSchedule(periods, milestones), []
    while (due := made.next_due(iterations[-1] if iterations else 0)) < end:
        iterations.append(due)
    assert all(made.next_due(i) == min(due for due in [*iterations, due] if due > i) for i in range(end - 1))
    return iterations


def test_the_authors_schedule():
    """Every 5 000 iterations before 20 000, then every 31 000 (their 1x schedule has 90 000)."""
    assert schedule([5000, 31000], [20000], 90000) == [5000, 10000, 15000, 31000, 62000]


def test_schedules():
    assert schedule([2], [], 7) == [2, 4, 6]
    assert schedule([1, 3, 5], [3, 7], 21) == [1, 2, 3, 6, 10, 15, 20]


@pytest.mark.parametrize(
    "periods, milestones, message",
    [
        ([10.5], [], r"periods is \[10.5\]"),
        ([float("nan")], [], r"periods is \[nan\]"),
        ([0], [], r"periods is \[0\]; give whole numbers >= 1"),
        ([5, 5], [1e3], r"milestones is \[1000.0\]"),
        ([5, 5], [], r"periods is \[5, 5\] with milestones \[\]; give one period more"),
        ([5, 5, 5], [4, 2], r"milestones is \[4, 2\]; give ascending"),
    ],
)
def test_a_schedule_that_is_none_is_named(periods, milestones, message):
    with pytest.raises(ArgumentError, match=message):
        MatchingSchedule(periods, milestones)


@pytest.mark.slow
def test_updates_run_before_training_and_when_due_but_not_after_the_end(cfg, monkeypatch):
    updates = count_updates(monkeypatch)
    cfg.SOLVER.MAX_ITER = 4
    seeded_trainer(cfg).train()
    assert updates == [0, 2]


@pytest.mark.slow
def test_groups_change_only_in_an_update(cfg, monkeypatch):
    changes = []
    original = Distiller.set_matching
    monkeypatch.setattr(
        Distiller, "set_matching", lambda self, p, **k: (changes.append(p.name), original(self, p, **k))
    )
    trainer = seeded_trainer(cfg)
    trainer.train()
    assert changes == ["res2", "res3", "res4", "res5"] * 3  # iterations 0, 2 and 4


@pytest.mark.slow
def test_training_sees_the_data_and_draws_of_a_run_without_distillation(cfg):
    def files_and_draws(cfg):
        seen = []

        class Recorder(Trainer):
            def run_step(self):
                data = next(self._trainer._data_loader_iter)
                self._trainer._data_loader_iter_obj = iter([data])
                flipped = [int(x["image"].long().sum()) for x in data]
                super().run_step()
                self._trainer._data_loader_iter_obj = iterator[0]
                seen.append(([x["file_name"] for x in data], flipped))

        trainer = seeded_trainer(cfg, Recorder)
        iterator = [trainer._trainer._data_loader_iter]
        trainer.train()
        return seen, float(torch.rand(1)), float(np.random.rand()), random.random()

    from mgd_det.config import without_distillation

    assert files_and_draws(cfg) == files_and_draws(without_distillation(cfg))


@pytest.mark.slow
def test_losses_and_costs_are_logged(cfg):
    trainer = seeded_trainer(cfg)
    trainer.train()
    names = set(trainer.storage.histories())
    for position in ("res2", "res3", "res4", "res5"):
        assert {f"loss_mgd_{position}", f"mgd/cost_{position}"} <= names


@pytest.mark.slow
def test_resuming_continues_with_equal_tensors_and_without_measuring(cfg, monkeypatch, tmp_path):
    full = seeded_trainer(cfg)
    full.train()
    checkpoint = torch.load(tmp_path / "model_0000002.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")

    cfg.SEED = 99  # another start: nothing may come from it
    resumed = seeded_trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    saved = checkpoint["trainer"]
    assert_equal(resumed.model.state_dict(), checkpoint["model"])
    assert_equal(resumed.optimizer.state_dict(), saved["_trainer"]["optimizer"])
    hook = next(h for h in resumed._hooks if isinstance(h, MatchingUpdate))
    assert_equal(hook.state_dict(), saved["hooks"]["MatchingUpdate"])

    updates = count_updates(monkeypatch)
    resumed.train()
    assert updates == [4]


@pytest.mark.slow
def test_a_resumed_step_has_the_losses_of_an_uninterrupted_one(cfg, tmp_path):
    trainer = seeded_trainer(cfg)
    trainer.train()
    resumed = seeded_trainer(cfg)
    resumed.resume_or_load(resume=True)
    losses = []
    for model in (trainer.model, resumed.model):
        model.train()
        torch.manual_seed(0)
        with torch.no_grad(), EventStorage():
            losses.append(model(toy.batch()))
    assert_equal(*losses)


@pytest.mark.slow
def test_a_checkpoint_of_other_positions_is_refused(cfg, tmp_path):
    seeded_trainer(cfg).train()
    cfg.MODEL.MGD.POSITIONS = ["res3"]
    other = seeded_trainer(cfg)
    with pytest.raises(UserError, match="distilled at res2, res3, res4, res5, but MODEL.MGD.POSITIONS gives res3"):
        other.resume_or_load(resume=True)


@pytest.mark.slow
def test_checkpoints_hold_neither_teacher_nor_distiller_with_the_model(cfg, tmp_path):
    seeded_trainer(cfg).train()
    from mgd_det.config import without_distillation

    plain = build_model(without_distillation(cfg))
    for path in Path(tmp_path).glob("*.pth"):
        checkpoint = torch.load(path)
        assert list(checkpoint["model"]) == list(plain.state_dict())
        assert set(checkpoint) == {"model", "trainer", "iteration"}


@pytest.mark.slow
def test_the_hook_makes_plain_detectron2_trainers_distil(cfg):
    """Without our Trainer: the hook alone brings the losses into the loss dict."""
    from detectron2.engine import SimpleTrainer
    from detectron2.solver import build_optimizer

    model = build_model(cfg)
    batches = [toy.batch(seed=i) for i in range(4)]
    trainer = SimpleTrainer(model, batches, build_optimizer(cfg, model))
    trainer.register_hooks([MatchingUpdate(model, lambda: batches, num_batches=2, periods=[10], source="measured")])
    trainer.train(0, 2)
    assert trainer.storage.history("loss_mgd_res4").latest() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        ({"periods": [0]}, r"^periods is \[0\]"),
        ({"periods": [2, 3]}, r"^periods is \[2, 3\] with milestones \[\]"),
        ({"periods": [1, 2, 3], "milestones": [9, 5]}, r"^milestones is \[9, 5\]"),
        ({"periods": [2], "num_batches": 0}, "^num_batches is 0"),
        ({"periods": [2], "source": "offline"}, "^source is 'offline'; .* online, measured"),
    ],
)
def test_invalid_arguments_are_named(cfg, options, message):
    with pytest.raises(ArgumentError, match=message):
        MatchingUpdate(build_model(cfg), lambda: [], **{"num_batches": 1, **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.MGD.MATCHING.NUM_BATCHES", 0),
        ("MODEL.MGD.MATCHING.PERIODS", [0]),
        ("SOLVER.CHECKPOINT_PERIOD", 0),
        ("SOLVER.CHECKPOINTS_KEPT", -1),
        ("SOLVER.ACCUMULATE", 0),
        ("SOLVER.NON_FINITE.POLICY", "ignore"),
        ("SOLVER.NON_FINITE.MAX_IN_A_ROW", 0),
    ],
)
def test_the_yaml_trainer_names_the_key(cfg, key, value):
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=f"^{re.escape(f'{key} is {value!r}')}"):
        Trainer(cfg)


@pytest.mark.slow
def test_a_loader_without_a_batch_is_named(cfg):
    trainer = seeded_trainer(cfg)
    hook = next(h for h in trainer._hooks if isinstance(h, MatchingUpdate))
    hook._build_data_loader = lambda: []
    with pytest.raises(UserError, match="no batch to measure"):
        trainer.train()


def assert_equal(a, b):
    assert type(a) is type(b), (type(a), type(b))
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.slow
def test_features_that_are_not_finite_are_named_with_their_position(cfg):
    trainer = seeded_trainer(cfg)
    torch.nn.init.constant_(trainer.model.backbone.bottom_up.res4[0].conv1.weight, float("nan"))
    with pytest.raises(UserError, match="matching at res4: .*not finite"):
        trainer.train()


@pytest.mark.slow
def test_the_schedule_scales_with_the_number_of_workers(cfg):
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 2, 4, 10
    matching = cfg.MODEL.MGD.MATCHING
    matching.PERIODS, matching.MILESTONES, matching.NUM_BATCHES = [2, 3], [5], 2
    trainer = Trainer(cfg)
    assert trainer.max_iter == 20 and trainer.cfg.SOLVER.IMS_PER_BATCH == 2
    matching = trainer.cfg.MODEL.MGD.MATCHING
    assert (matching.PERIODS, matching.MILESTONES, matching.NUM_BATCHES) == ([4, 6], [10], 4)


@pytest.mark.slow
def test_the_scale_of_the_loss_is_measured_once(cfg):
    trainer = seeded_trainer(cfg)
    distiller = trainer.model.backbone.mgd.distiller
    scales = []

    class Recorder(hooks.HookBase):
        def after_step(self):
            scales.append([distiller.mean_square(p).item() for p in distiller.positions])

    trainer.register_hooks([Recorder()])
    trainer.train()
    assert all(scale == scales[0] for scale in scales) and min(scales[0]) > 0


@pytest.mark.slow
def test_only_an_online_update_needs_no_data(cfg):
    model = build_model(cfg)
    MatchingUpdate(model, num_batches=1, periods=[2])
    with pytest.raises(ArgumentError, match="^build_data_loader is None"):
        MatchingUpdate(model, num_batches=1, periods=[2], source="measured")


@pytest.mark.slow
def test_a_validation_loss_before_the_first_step_has_the_detectors_own_losses(cfg):
    """No matching is solved yet when this hook runs, and none is needed."""
    validation = []

    class ValidationLoss(hooks.HookBase):
        def before_train(self):
            with torch.no_grad():
                validation.append(self.trainer.model(toy.batch()))

    trainer = seeded_trainer(cfg)
    trainer.max_iter = 1
    trainer._hooks.insert(0, ValidationLoss())
    trainer._hooks[0].trainer = trainer
    assert any(isinstance(hook, MatchingUpdate) for hook in trainer._hooks)
    trainer.test = lambda *args: {}
    trainer.train()
    assert set(validation[0]) == {"loss_cls", "loss_box_reg"}
    assert "loss_mgd_res5" in trainer.storage.histories()
