"""An evaluation at the end of a training, and none after an error."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from mgd_det.engine.hooks.evaluation import EvaluationHook


@pytest.mark.parametrize("fails_at, evaluations", [(None, 1), (2, 0), (0, 0)])
def test_it_evaluates_where_training_came_to_its_end(fails_at, evaluations):
    class Net(nn.Linear):
        def forward(self, batch):
            if batch == fails_at:
                raise RuntimeError("worker gone")
            return super().forward(torch.ones(1, 1)).sum()

    calls = []
    net = Net(1, 1)
    trainer = SimpleTrainer(net, range(3), torch.optim.SGD(net.parameters(), lr=0.1))
    trainer.register_hooks([EvaluationHook(0, lambda: calls.append("evaluated"))])
    if fails_at is None:
        trainer.train(0, 3)
    else:
        with pytest.raises(RuntimeError, match="worker gone"):
            trainer.train(0, 3)
    assert len(calls) == evaluations
