"""The matching from training's own features, against costs in numpy of the features that the losses were given."""

import numpy as np
import pytest
import torch
import toy
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from torch.nn.parallel import DistributedDataParallel

from mgd_det.data import register_coco_folder
from mgd_det.engine import MatchingUpdate, Trainer, lazy_trainer
from mgd_det.engine.non_finite import NonFinitePolicy
from mgd_det.engine.training_step import TrainStep
from mgd_det.matching import assign_channels
from mgd_det.modeling import find_distillation


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return toy.save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture
def cfg(teacher):
    return toy.distilled_config(
        teacher, opts=["MODEL.MGD.MARGIN", "measured", "MODEL.MGD.POSITIONS", "['res3', 'res4']"]
    )


def no_loader():
    raise AssertionError("an online update makes a data loader")


class Recording:
    """Of a model: the features that its distiller is given, the groups in force then, and what ran."""

    def __init__(self, model):
        backbone = find_distillation(model)
        self.distiller = backbone.distiller
        self.positions = self.distiller.positions
        self.features, self.groups, self.observed, self.forwards = [], [], [], {"student": 0, "teacher": 0}
        self.distiller.register_forward_pre_hook(lambda module, args: self._record(backbone, *args))
        for name, net in (("student", model.backbone), ("teacher", backbone.teacher.backbone)):
            net.bottom_up.stem.register_forward_hook(lambda *_, name=name: self._count(name))

    def _record(self, backbone, student, teacher):
        copies = [{k: x.detach().double().numpy().copy() for k, x in maps.items()} for maps in (student, teacher)]
        self.features.append(copies)
        self.groups.append({p.name: self.distiller.groups(p).clone() for p in self.positions})
        self.observed.append(backbone.observer is not None)

    def _count(self, name):
        self.forwards[name] += 1

    def expected_groups(self, p, forwards):
        similarities = []
        for student, teacher in (self.features[i] for i in forwards):
            for s, t in zip(student[p.student], teacher[p.teacher]):
                s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
                similarities.append(s / np.linalg.norm(s, axis=1)[:, None] @ (t / np.linalg.norm(t, axis=1)[:, None]).T)
        return assign_channels(torch.from_numpy(2 - 2 * np.mean(similarities, axis=0)))

    def expected_margin(self, p, forwards):
        maps = np.concatenate([self.features[i][1][p.teacher] for i in forwards]).swapaxes(0, 1)
        return [x[x < 0].mean() if (x < 0).any() else 0 for x in maps]


def train(model, batches, start, end, lr=0.01, accumulate=1, state=None, extra=(), **matching):
    step = TrainStep(model, batches, torch.optim.SGD(model.parameters(), lr=lr), accumulate=accumulate)
    hook = MatchingUpdate(model, no_loader, source="online", **matching)
    step.register_hooks([hook, *extra])
    if state is not None:
        hook.load_state_dict(state)
    step.train(start, end)
    return step, hook


def seeded_model(cfg):
    torch.manual_seed(3)
    return build_model(cfg)


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
    for i, source in ((0, [0]), (1, [0, 1]), (5, [4, 5])):  # after the step
        for p in seen.positions:
            np.testing.assert_allclose(margins[i][p.name].numpy(), seen.expected_margin(p, source), rtol=1e-5)
    assert all(scale == scales[0] for scale in scales) and min(scales[0]) > 0
    history = step.storage.history("mgd/cost_res4").values()
    assert len(history) == 3 and all(0 < cost < 2 for cost, _ in history)


def test_every_forward_of_a_step_counts_and_a_window_ends_at_the_next_update(cfg):
    model = seeded_model(cfg)
    seen = Recording(model)
    batches = [toy.batch(seed=i) for i in range(6)]
    train(model, batches, 0, 3, accumulate=2, num_batches=100, periods=[2])
    for i, source in ((1, [0]), (4, [0, 1, 2, 3])):
        for p in seen.positions:
            assert torch.equal(seen.groups[i][p.name], seen.expected_groups(p, source)), (i, p.name)


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


def test_a_training_shorter_than_any_window_has_the_first_matching(cfg):
    model = seeded_model(cfg)
    seen = Recording(model)
    _, hook = train(model, [toy.batch(seed=i) for i in range(2)], 0, 2, num_batches=100, periods=[5000])
    assert seen.observed == [True, False] and hook.state_dict()["online"]["sums"] is None
    for p in seen.positions:
        assert torch.equal(seen.groups[1][p.name], seen.expected_groups(p, [0]))


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


def test_two_ranks_have_the_matching_of_all_their_features_also_after_a_resume(cfg, run_ranks):
    shares = [[toy.batch(seed=3 * rank + i) for i in range(3)] for rank in range(2)]

    class Saves(HookBase):
        """As rank 0's checkpointer: it is no collective."""

        def __init__(self, matching):
            self.matching, self.states = matching, {}

        def after_step(self):
            self.states[self.trainer.iter + 1] = self.matching.state_dict()

    def rank_train(rank, start, state):
        model = DistributedDataParallel(seeded_model(cfg))
        step = TrainStep(model, shares[rank][start:], torch.optim.SGD(model.parameters(), lr=0.0))
        options = {"num_batches": 2, "periods": [100], "checkpoint_period": 1}
        saves = Saves(MatchingUpdate(model, no_loader, source="online", **options))
        step.register_hooks([saves.matching, saves])
        if state is not None:
            saves.matching.load_state_dict(state)
        step.train(start, 3)
        return saves.states

    first, second = run_ranks(rank_train, 2, 0, None)
    # Learning rate 0, and batch norm of each batch: one process that sees the batches in turn has the same features.
    alone = seeded_model(cfg)
    train(alone, [*shares[0][:2], *shares[1][:2], shares[0][2]], 0, 5, lr=0.0, num_batches=4, periods=[100])
    resumed = run_ranks(rank_train, 2, 1, first[1])
    distiller = find_distillation(alone).distiller
    for p in distiller.positions:
        for states in (first, second, *resumed):
            matching = states[2]["matchings"][p.name]
            assert torch.equal(matching["groups"], distiller.groups(p))
            torch.testing.assert_close(matching["margin"], distiller.margin(p))
        assert not torch.equal(first[1]["matchings"][p.name]["groups"], distiller.groups(p))


def test_train_matching_of_a_lazy_config_names_the_source(cfg):
    matching = {"num_batches": 2, "periods": [5], "source": "online"}
    lazy = OmegaConf.create({"train": {"matching": matching, "checkpointer": {"period": 7}}})
    hook = lazy_trainer._matching_hook(lazy, seeded_model(cfg))
    assert "online" in hook.state_dict() and hook._checkpoint_period == 7
