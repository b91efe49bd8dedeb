"""Modes of modules, and the detector inside a wrapper."""

from contextlib import contextmanager
from typing import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module in eval mode, and each submodule back into its own mode at the end."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def unwrapped(model: nn.Module) -> nn.Module:
    """The detector itself, also where it is inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model
