"""The matching from training's own features, against costs in numpy of the features that the losses were given."""

import logging

import numpy as np
import pytest
import torch
import toy
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from omegaconf import OmegaConf
from online_matching import Recording, no_loader, online_config, seeded_model, train

from mgd_det.data import register_coco_folder
from mgd_det.engine import MatchingUpdate, Trainer, lazy_trainer
from mgd_det.engine.non_finite import NonFinitePolicy
from mgd_det.engine.training_step import TrainStep
from mgd_det.errors import UserError
from mgd_det.modeling import find_distillation


@pytest.fixture
def cfg(teacher):
    return online_config(teacher)


@pytest.mark.slow
def test_groups_are_of_the_features_of_the_steps_before_and_nothing_runs_for_them(cfg):
    model = seeded_model(cfg)
    seen = Recording(model)
    batches = [toy.batch(seed=i) for i in range(9)]
    margins, scales = [], []

    class Recorder(HookBase):
        def after_step(self):
            margins.append({p.name: seen.distiller.margin(p).clone() for p in seen.positions})
            scales.append([seen.distiller.mean_square(p).item() for p in seen.positions])

    step, hook = train(model, batches, 0, 9, extra=[Recorder()], num_batches=2, periods=[6])
    # One forward of each net a step; features are looked at in the windows before updates alone.
    assert seen.forwards == {"student": 9, "teacher": 9}
    assert seen.observed == [True, True, False, False, True, True, False, False, False]
    assert find_distillation(model).observer is None
    # The first step's own, then the first window's, then that of the update due at iteration 6.
    sources = [[0]] * 2 + [[0, 1]] * 4 + [[4, 5]] * 3
    for i, source in enumerate(sources):
        for p in seen.positions:
            assert torch.equal(seen.groups[i][p.name], seen.expected_groups(p, source)), (i, p.name)
    for earlier, later in ((0, 2), (2, 6)):
        assert not torch.equal(seen.groups[earlier]["res4"], seen.groups[later]["res4"])
    for i, source in ((0, [0]), (2, [0, 1]), (6, [4, 5])):
        for p in seen.positions:
            np.testing.assert_allclose(margins[i][p.name].numpy(), seen.expected_margin(p, source), rtol=1e-5)
    # The scale: of the first batch, then of the first window, then constant.
    assert scales[1] == scales[0] and all(scale == scales[2] for scale in scales[3:])
    for i, source in ((0, [0]), (2, [0, 1])):
        expected = [seen.expected_mean_square(p, source, margins[0][p.name]) for p in seen.positions]
        np.testing.assert_allclose(scales[i], expected, rtol=1e-5)
    assert scales[2] != scales[0]
    history = step.storage.history("mgd/cost_res4").values()
    assert len(history) == 3 and all(0 < cost < 2 for cost, _ in history)


@pytest.mark.slow
def test_every_forward_of_a_step_counts_and_a_window_ends_at_the_next_update(cfg):
    model = seeded_model(cfg)
    seen = Recording(model)
    batches = [toy.batch(seed=i) for i in range(10)]
    train(model, batches, 0, 5, accumulate=2, num_batches=4, periods=[2])
    for i, source in ((1, [0]), (4, [0, 1, 2, 3])):
        for p in seen.positions:
            assert torch.equal(seen.groups[i][p.name], seen.expected_groups(p, source)), (i, p.name)


@pytest.mark.slow
def test_a_first_step_that_is_skipped_keeps_its_matching(cfg):
    """Its loss is not finite; its features, by which the matching was solved in its forward, are."""
    model = seeded_model(cfg)
    poison = [float("nan"), 1.0]
    model.register_forward_hook(lambda module, args, losses: {k: v * poison[0] for k, v in losses.items()})
    model.register_forward_hook(lambda *_: poison.pop(0) and None)
    batches = [toy.batch(seed=i) for i in range(2)]
    step = TrainStep(
        model, batches, torch.optim.SGD(model.parameters(), lr=0.01), non_finite=NonFinitePolicy("skip", 3)
    )
    step.register_hooks([MatchingUpdate(model, no_loader, source="online", num_batches=5, periods=[10])])
    step.train(0, 2)
    assert step.skipped_steps == 1
    assert find_distillation(model).distiller.is_matched


@pytest.mark.slow
def test_padding_does_not_count_for_the_scale(cfg):
    model = seeded_model(cfg)
    seen = Recording(model)
    margins = []

    class Recorder(HookBase):
        def after_step(self):
            margins.append({p.name: seen.distiller.margin(p).clone() for p in seen.positions})

    batches = [toy.batch(((64, 64), (33, 40)), seed=i) for i in range(3)]
    train(model, batches, 0, 3, extra=[Recorder()], num_batches=2, periods=[6])
    for p, second in zip(seen.positions, ((5, 5), (3, 3))):  # strides 8 and 16
        covered = [(64, 64), second]
        expected = seen.expected_mean_square(p, [0, 1], margins[0][p.name], covered)
        assert seen.distiller.mean_square(p).item() == pytest.approx(expected, rel=1e-5)
        assert expected != pytest.approx(seen.expected_mean_square(p, [0, 1], margins[0][p.name]), rel=1e-3)


@pytest.mark.slow
def test_a_training_shorter_than_a_window_has_a_first_window_of_a_tenth(cfg, caplog):
    caplog.set_level(logging.INFO)
    model = seeded_model(cfg)
    seen = Recording(model)
    batches = [toy.batch(seed=i % 4) for i in range(20)]
    _, hook = train(model, batches, 0, 20, lr=0.0, num_batches=20, periods=[5000])
    assert hook.state_dict()["online"] == {"first_window_end": None, "sums": None}
    assert seen.observed == [True, True] + [False] * 18
    for p in seen.positions:
        assert all(torch.equal(groups[p.name], seen.expected_groups(p, [0, 1])) for groups in seen.groups[2:])
    assert caplog.text.count("NUM_BATCHES 20 ") == 1 and "2 steps" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("end, observed", [(1, [True]), (2, [True, False])])
def test_the_first_window_of_a_tiny_training_has_a_step(cfg, end, observed):
    model = seeded_model(cfg)
    seen = Recording(model)
    train(model, [toy.batch(seed=i) for i in range(end)], 0, end, num_batches=100, periods=[5000])
    assert seen.observed == observed
    for p in seen.positions:
        assert torch.equal(seen.distiller.groups(p), seen.expected_groups(p, [0]))


@pytest.mark.slow
def test_a_first_window_that_fits_keeps_its_length(cfg, caplog):
    caplog.set_level(logging.INFO)
    model = seeded_model(cfg)
    seen = Recording(model)
    train(model, [toy.batch(seed=i) for i in range(4)], 0, 4, num_batches=3, periods=[5000])
    assert seen.observed == [True, True, True, False] and "NUM_BATCHES" not in caplog.text


class Measured(HookBase):
    """A hook of source "measured"; ``iterations`` are those in which it has measured."""

    def __init__(self, model):
        self.hook = MatchingUpdate(model, self._loader, source="measured", num_batches=1, periods=[100])
        self.made, self.iterations = 0, []

    def _loader(self):
        self.made += 1
        return [toy.batch(seed=7)]

    def after_step(self):
        self.iterations += [self.trainer.iter] * self.made
        self.made = 0


@pytest.mark.slow
@pytest.mark.parametrize("finished, measured", [(1, [2]), (3, [])])
def test_the_source_measured_measures_at_once_where_the_first_window_is_open(cfg, finished, measured):
    model, states = seeded_model(cfg), []

    class Recorder(HookBase):
        def after_step(self):
            states.append(hook.state_dict())

    step = TrainStep(model, [toy.batch(seed=i) for i in range(4)], torch.optim.SGD(model.parameters(), lr=0.01))
    hook = MatchingUpdate(model, no_loader, num_batches=2, periods=[100])
    step.register_hooks([hook, Recorder()])
    step.train(0, 4)
    saved = states[finished]["matchings"]
    model = seeded_model(cfg)
    step = TrainStep(model, [toy.batch(seed=i) for i in range(3)], torch.optim.SGD(model.parameters(), lr=0.01))
    source = Measured(model)
    step.register_hooks([source.hook, source])
    source.hook.load_state_dict(states[finished])
    step.train(2, 5)
    assert source.iterations == measured
    distiller = find_distillation(model).distiller
    for p in distiller.positions:
        assert torch.equal(distiller.mean_square(p), saved[p.name]["mean_square"]) == (not measured)
        assert torch.equal(distiller.margin(p), saved[p.name]["margin"]) == (not measured)


@pytest.mark.slow
def test_resuming_inside_a_window_ends_with_equal_tensors(teacher, tmp_path):
    _, train_json, _, train_images, *_ = toy.write_scenes(tmp_path / "toy")
    register_coco_folder("online_train", train_json, train_images)
    opts = ["DATASETS.TRAIN", "('online_train',)", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2", "SEED", "5"]
    opts += ["SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001", "SOLVER.CHECKPOINT_PERIOD", "2"]
    opts += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path), "MODEL.MGD.MARGIN", "measured"]
    opts += ["MODEL.MGD.MATCHING.SOURCE", "online", "MODEL.MGD.MATCHING.NUM_BATCHES", "3"]
    cfg = toy.distilled_config(teacher, opts=[*opts, "MODEL.MGD.MATCHING.PERIODS", "[100]"])
    try:
        Trainer(cfg).train()
        uninterrupted = torch.load(tmp_path / "model_final.pth")
        saved = torch.load(tmp_path / "model_0000001.pth")["trainer"]["hooks"]["MatchingUpdate"]
        assert saved["online"]["first_window_end"] == 3 and saved["online"]["sums"].count_nonzero() > 0
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
        resumed = Trainer(cfg)
        resumed.resume_or_load(resume=True)
        assert resumed.start_iter == 2
        resumed.train()
    finally:
        DatasetCatalog.remove("online_train")
    again = torch.load(tmp_path / "model_final.pth")
    matchings = again["trainer"]["hooks"]["MatchingUpdate"]["matchings"]
    assert not torch.equal(matchings["res4"]["groups"], saved["matchings"]["res4"]["groups"])  # it was updated since
    for name, matching in uninterrupted["trainer"]["hooks"]["MatchingUpdate"]["matchings"].items():
        assert all(torch.equal(tensor, matchings[name][key]) for key, tensor in matching.items()), name
    assert all(torch.equal(tensor, again["model"][key]) for key, tensor in uninterrupted["model"].items())


@pytest.mark.slow
def test_a_checkpoint_of_version_0_1_was_saved_after_the_update_that_was_due(cfg):
    """It has the new matching and no window: training continues with it."""
    model = seeded_model(cfg)
    _, hook = train(model, [toy.batch()], 0, 1, num_batches=2, periods=[3])
    state = hook.state_dict()
    state["online"] = {"first_window_end": None, "sums": None}
    model = seeded_model(cfg)
    seen = Recording(model)
    train(model, [toy.batch(seed=i) for i in range(4)], 3, 7, state=state, num_batches=2, periods=[3])
    assert seen.observed == [False, True, True, False]
    for p in seen.positions:
        assert all(torch.equal(seen.groups[i][p.name], state["matchings"][p.name]["groups"]) for i in range(3))
        assert torch.equal(seen.groups[3][p.name], seen.expected_groups(p, [1, 2]))


def test_train_matching_of_a_lazy_config_names_the_source(cfg):
    matching = {"num_batches": 2, "periods": [5], "source": "online"}
    lazy = OmegaConf.create({"train": {"matching": matching, "checkpointer": {"period": 7}}})
    assert "online" in lazy_trainer._matching_hook(lazy, seeded_model(cfg)).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    "matching, said",
    [
        ({"num_batches": 0}, "^train.matching.num_batches is 0"),
        ({"source": "offline"}, "^train.matching.source is 'offline'"),
        ({"milestones": [1]}, r"^train.matching.periods is \[5\]"),
        ({"checkpoint_period": 7}, "^train.matching is .*'checkpoint_period'"),
    ],
)
def test_a_lazy_configs_mistakes_name_the_entry(cfg, matching, said):
    lazy = OmegaConf.create({"train": {"matching": {"num_batches": 2, "periods": [5], **matching}}})
    with pytest.raises(UserError, match=said):
        lazy_trainer._matching_hook(lazy, seeded_model(cfg))
