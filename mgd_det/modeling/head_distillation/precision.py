"""Layers of the teacher's heads that compute in float32 under autocast."""

from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import nn


@contextmanager
def in_float32(*layers: nn.Module) -> Iterator[None]:
    """Let layers compute in float32 for the ``with`` block, also under autocast.

    A box is decoded from deltas that the last layer predicts. In bfloat16, a delta of 1 has an error of up to 0.004,
    which moves an edge of a box of 500 pixels by up to 2. The layers before it may stay in half precision.

    Args:
        layers: each with parameters in float32 and one tensor as its input.
    """
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _without_autocast(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _without_autocast(forward: Any) -> Any:
    def in_float(x: torch.Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    return in_float
