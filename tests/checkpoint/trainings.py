"""A small training, and checks of its folder of checkpoints."""

import re

import torch
from torch import nn

from mgd_det.checkpoint import TrainingCheckpointer


class Training:
    """A small model and optimizer, and their checkpointer."""

    def __init__(self, folder, seed=0, features=50):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(features, 40), nn.BatchNorm1d(40))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.checkpointer = TrainingCheckpointer(self.model, str(folder), optimizer=self.optimizer)

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self.model[0].in_features)).square().mean().backward()
        self.optimizer.step()

    def save(self, *iterations):
        """Step and save for each iteration. Return the tensors of the last checkpoint."""
        for iteration in iterations:
            self.step()
            self.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        return [value.clone() for value in self.tensors()]

    def tensors(self):
        momenta = [state["momentum_buffer"] for state in self.optimizer.state_dict()["state"].values()]
        return [*self.model.state_dict().values(), *momenta]


def assert_resumes(folder, name, tensors):
    """Check that a new training in the folder resumes from this checkpoint, with these weights and momenta."""
    training = Training(folder, seed=9)
    rest = training.checkpointer.resume_or_load("", resume=True)
    assert training.checkpointer.resumed_from == str(folder / name)
    assert rest["iteration"] == int(re.findall(r"\d+", name)[0])
    actual = training.tensors()
    assert len(actual) == len(tensors) and all(torch.equal(a, b) for a, b in zip(actual, tensors))


def names(folder):
    return sorted(path.name for path in folder.iterdir())
