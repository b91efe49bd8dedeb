"""What dense detectors divide their losses by is a number of each rank, and every rank gets its own back."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mgd_det.checkpoint import TrainingCheckpointer
from mgd_det.engine.hooks.loss_normalizer import LossNormalizer
from mgd_det.engine.training_step import TrainStep


class Detector(nn.Linear):
    """Its normalizer moves with every step, as RetinaNet's does."""

    def __init__(self, normalizer=None):
        super().__init__(1, 1)
        if normalizer is not None:
            self.loss_normalizer = normalizer

    def forward(self, batch):
        self.loss_normalizer = getattr(self, "loss_normalizer", 100.0) + batch[0]
        return {"loss": super().forward(torch.ones(1, 1)).mean()}


def loaded(state):
    model = Detector(100.0)
    LossNormalizer(model).load_state_dict(state)
    return getattr(model, "loss_normalizer", None)


def test_one_process_gets_its_number_back():
    assert LossNormalizer(Detector(3.5)).state_dict() == {"loss_normalizer": 3.5}
    assert loaded({"loss_normalizer": 3.5}) == 3.5


def test_a_detector_without_one():
    assert LossNormalizer(Detector()).state_dict() == {}
    assert loaded({}) is None


@pytest.mark.parametrize("value", [torch.tensor(2.0), 2])
def test_a_plain_number_is_saved(value):
    assert LossNormalizer(Detector(value)).state_dict() == {"loss_normalizer": 2.0}


def test_a_checkpoint_has_every_ranks_number_and_steps_gather_nothing(tmp_path, run_ranks):
    gathers = []

    def counted(function):
        def call(*args, **kwargs):
            gathers.append(function.__name__)
            return function(*args, **kwargs)

        return call

    def rank_train(rank):
        for name in ("all_gather", "all_gather_object", "all_gather_into_tensor"):
            setattr(dist, name, counted(getattr(dist, name)))
        model = Detector()
        step = TrainStep(
            DistributedDataParallel(model), [[1.0 + rank]] * 4, torch.optim.SGD(model.parameters(), lr=0.1)
        )
        hook = LossNormalizer(model)
        step.register_hooks([hook])
        checkpointer = TrainingCheckpointer(model, str(tmp_path), hook=hook)
        del gathers[:]
        step.train(0, 4)
        of_steps = list(gathers)
        checkpointer.save("model_final")
        state = torch.load(tmp_path / "model_final.pth")["hook"]
        return of_steps, len(gathers) > 0, state, loaded(state)

    first, second = run_ranks(rank_train, 2)
    assert first[:2] == second[:2] == ([], True)
    assert first[2] == {"loss_normalizer": [104.0, 108.0]}
    assert (first[3], second[3]) == (104.0, 108.0)
    # Of two ranks to one, and of one to two.
    assert loaded(first[2]) == 106.0
    assert run_ranks(lambda rank: loaded({"loss_normalizer": 7.0}), 2) == [7.0, 7.0]
