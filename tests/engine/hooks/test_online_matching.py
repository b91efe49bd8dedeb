"""The matching from training's own features, against costs in numpy of the features that the losses were given."""

import logging
import shutil

import numpy as np
import pytest
import torch
import toy
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.modeling import build_model
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch.nn.parallel import DistributedDataParallel

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.data import register_coco_folder
from mgd_det.distributed import ranks
from mgd_det.engine import MatchingUpdate, Trainer, lazy_trainer
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.evaluation import EvaluationHook
from mgd_det.engine.hooks.loss_normalizer import LossNormalizer
from mgd_det.engine.non_finite import NonFinitePolicy
from mgd_det.engine.training_step import TrainStep
from mgd_det.errors import UserError
from mgd_det.matching import assign_channels
from mgd_det.modeling import find_distillation


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

    def expected_mean_square(self, p, forwards, margin, covered=None):
        """By the groups of the first of these forwards; ``covered``: rows and columns of the images' part of a map."""
        groups, margin = self.groups[forwards[0]][p.name].numpy(), margin.double().numpy()
        values = []
        for maps in (self.features[i][1][p.teacher] for i in forwards):
            for image, (height, width) in zip(maps, covered or [maps.shape[2:]] * len(maps)):
                members = image[groups, :height, :width]  # (Cs, K, h, w)
                largest = np.abs(members).argmax(axis=1)
                target = np.take_along_axis(members, largest[:, None], axis=1)[:, 0]
                values.append(np.maximum(target, margin[groups].mean(1).reshape(-1, 1, 1)).ravel() ** 2)
        return np.concatenate(values).mean()

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


class Saves(HookBase):
    """Saves the matching after every step; ``states`` holds what was saved, by the iterations finished."""

    def __init__(self, matching, model, folder):
        self.checkpointer, self.folder, self.states = (
            TrainingCheckpointer(model, str(folder), hook=matching),
            folder,
            {},
        )

    def after_step(self):
        self.checkpointer.save("model")
        self.states[self.trainer.iter + 1] = torch.load(self.folder / "model.pth")["hook"]


@pytest.mark.slow
def test_two_ranks_have_the_matching_of_all_their_features_also_after_a_resume(cfg, run_ranks, tmp_path):
    shares = [[toy.batch(seed=3 * rank + i) for i in range(3)] for rank in range(2)]

    def saved(model, batches, start, num_batches, state=None):
        # Learning rate 0, and batch norm of each batch: one process that sees the batches in turn has these features.
        step = TrainStep(model, batches[start:], torch.optim.SGD(model.parameters(), lr=0.0))
        matching = MatchingUpdate(model, no_loader, num_batches=num_batches, periods=[100])
        saves = Saves(matching, model, tmp_path)
        step.register_hooks([matching, saves])
        if state is not None:
            matching.load_state_dict(state)
        step.train(start, len(batches))
        return saves.states

    def rank_train(rank, start, state):
        return saved(DistributedDataParallel(seeded_model(cfg)), shares[rank], start, 2, state)

    first, second = run_ranks(rank_train, 2, 0, None)
    model = seeded_model(cfg)
    alone = saved(model, [batch for pair in zip(*shares) for batch in pair], 0, num_batches=4)
    for finished in (1, 2):  # both ranks' sums, of an open window and of one whose update is due
        of_both, of_one = first[finished]["online"]["sums"], alone[2 * finished]["online"]["sums"]
        squares = 2 * len(find_distillation(model).distiller.positions)
        # Convolutions of a process with DistributedDataParallel may round differently.
        torch.testing.assert_close(of_both[:-squares], of_one[:-squares], rtol=1e-5, atol=1e-5)
        # The squares are by the groups in force: of both ranks' first batches, or of one. As many values are both.
        assert torch.equal(of_both[-squares:][1::2], of_one[-squares:][1::2])
    assert first[3]["online"] == {"first_window_end": None, "sums": None}
    resumed = [state for start in (1, 2) for state in run_ranks(rank_train, 2, start, first[start])]
    for p in find_distillation(model).distiller.positions:
        expected = alone[5]["matchings"][p.name]
        for states in (first, second, *resumed):
            matching = states[3]["matchings"][p.name]
            assert torch.equal(matching["groups"], expected["groups"])
            torch.testing.assert_close(matching["margin"], expected["margin"], rtol=1e-5, atol=1e-6)
            scale = first[3]["matchings"][p.name]["mean_square"]
            torch.testing.assert_close(matching["mean_square"], scale, rtol=1e-5, atol=0.0)
        assert not torch.equal(first[1]["matchings"][p.name]["groups"], expected["groups"])


@pytest.mark.slow
def test_the_hook_may_stand_at_another_place_on_each_rank(cfg, run_ranks, tmp_path):
    """Also behind the one that saves: each checkpoint resumes to the weights and matching of the whole training."""

    def rank_train(rank, folder, resume):
        model = DistributedDataParallel(seeded_model(cfg))
        batches = [toy.batch(((64, 64),) * (3 - rank), seed=10 * rank + i) for i in range(5)]
        step = TrainStep(model, batches, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
        checkpointer = TrainingCheckpointer(model, str(folder), trainer=step)
        matching = MatchingUpdate(model, no_loader, num_batches=2, periods=[3])
        hooks = [matching, LossNormalizer(model), CheckpointHook(checkpointer, period=1)]
        step.register_hooks(hooks if rank == 0 else hooks[::-1])
        checkpointer.resume_or_load("", resume=resume)
        start = step.iter + 1 if checkpointer.resumed_from else 0
        step.data_loader = batches[start:]
        step.train(start, 5)
        return float(step.model.module.loss_normalizer), matching.state_dict()["matchings"]

    (tmp_path / "whole").mkdir()
    whole = run_ranks(rank_train, 2, tmp_path / "whole", False)
    assert whole[0][0] != whole[1][0] and equal(whole[0][1], whole[1][1])
    final = torch.load(tmp_path / "whole" / "model_final.pth")
    for iteration in (0, 2):  # in the first window, and with an update due
        name = f"model_{iteration:07d}.pth"
        folder = tmp_path / str(iteration)
        folder.mkdir()
        shutil.copy(tmp_path / "whole" / name, folder)
        (folder / "last_checkpoint").write_text(name)
        assert equal(run_ranks(rank_train, 2, folder, True), whole)
        assert equal(torch.load(folder / "model_final.pth"), final)
    saved = torch.load(tmp_path / "whole" / "model_0000002.pth")["trainer"]["hooks"]["MatchingUpdate"]
    assert not equal(saved["matchings"], whole[0][1])  # the update that was due then changed it


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


class Detectron2Trainer(DefaultTrainer):
    """Detectron2's trainer, hooks and checkpointer, with one more hook."""

    @classmethod
    def build_train_loader(cls, cfg):
        return [toy.batch(seed=10 * comm.get_rank() + i) for i in range(4)]

    def build_hooks(self):
        return [MatchingUpdate(self.model, num_batches=3, periods=[100]), *super().build_hooks()]


@pytest.mark.slow
def test_detectron2s_trainer_on_two_ranks_saves_rank_0s_part_and_says_so(cfg, run_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("detectron2.engine.defaults.create_ddp_model", ranks.distributed)  # which runs on the CPU, too
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 4, (), 2
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (), str(tmp_path)

    def rank_train(rank):
        said = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("mgd_det").addHandler(handler)
        trainer = Detectron2Trainer(cfg)
        trainer.train()
        matching = trainer._hooks[0].state_dict()["matchings"]
        resumed = Detectron2Trainer(cfg)
        resumed.checkpointer.load(str(tmp_path / "model_0000001.pth"))
        return [text for text in said if "TrainingCheckpointer" in text], matching, resumed._hooks[0]._window.num_images

    (said, matching, images), (nothing, other, none) = run_ranks(rank_train, 2)
    assert len(said) == 1 and nothing == [] and equal(matching, other)
    assert (images, none) == (4, 0)  # of the two steps' two images on rank 0; the rest of the window adds to them


@pytest.mark.slow
def test_best_checkpointer_saves_all_ranks_window(cfg, run_ranks, tmp_path):
    """Detectron2's hook, for which every rank must know the score that rank 0 has."""

    def rank_train(rank):
        model = DistributedDataParallel(seeded_model(cfg))
        batches = [toy.batch(seed=10 * rank + i) for i in range(4)]
        step = TrainStep(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
        checkpointer = TrainingCheckpointer(model, str(tmp_path), trainer=step)
        scores = iter([0.5, 0.7, 0.6, 0.1])
        matching = MatchingUpdate(model, no_loader, num_batches=4, periods=[100])
        hooks = [matching, EvaluationHook(1, lambda: {"bbox": {"AP": next(scores)}} if rank == 0 else {})]
        step.register_hooks([*hooks, BestCheckpointer(1, checkpointer, "bbox/AP")])
        step.train(0, 4)

    run_ranks(rank_train, 2)
    saved = torch.load(tmp_path / "model_best.pth")
    model = seeded_model(cfg)
    batches = [toy.batch(seed=10 * rank + i) for i in range(2) for rank in range(2)]
    _, hook = train(model, batches, 0, 4, lr=0.0, num_batches=9, periods=[100])
    assert saved["iteration"] == 1
    online = saved["trainer"]["hooks"]["MatchingUpdate"]["online"]
    torch.testing.assert_close(online["sums"], hook.state_dict()["online"]["sums"])


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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
