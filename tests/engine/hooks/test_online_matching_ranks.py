"""The matching from training's own features on two ranks."""

import logging
import shutil

import pytest
import torch
import toy
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils import comm
from online_matching import no_loader, online_config, seeded_model, train
from saved_state import equal
from torch.nn.parallel import DistributedDataParallel

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.distributed import ranks
from mgd_det.engine import MatchingUpdate
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.evaluation import EvaluationHook
from mgd_det.engine.hooks.loss_normalizer import LossNormalizer
from mgd_det.engine.training_step import TrainStep
from mgd_det.modeling import find_distillation


@pytest.fixture
def cfg(teacher):
    return online_config(teacher)


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
