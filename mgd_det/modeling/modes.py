"""Modes of modules, and the detector inside a wrapper."""

from contextlib import contextmanager
from typing import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode; at the end, restore the mode of each submodule."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the detector itself, without a DistributedDataParallel around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model
