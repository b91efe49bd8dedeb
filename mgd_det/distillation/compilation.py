"""torch.compile for a network whose features are read while it runs."""

import logging
from functools import cache
from typing import Iterable, List

import torch
from torch import nn

from mgd_det.errors import first_line

logger = logging.getLogger(__name__)

# A part is compiled for training, for evaluation, and for each of them again where sizes vary.
_MODES = 4


def compile_around(network: nn.Module, read: Iterable[nn.Module], what: str) -> int:
    """Compile, in place, every part of a network that makes none of its features.

    :class:`FeatureHooks` reads a feature by hooks and a torch function mode, which torch.compile would trace once and
    then leave out, or refuse. So the modules that features are read in run as they are, and the largest ones without
    any of them are compiled separately, for images of any size (``dynamic=True``).

    If torch.compile does not work on this machine (it needs a C++ compiler), a warning says so and nothing changes.

    Args:
        network: already on its device.
        read: the modules, inside ``network``, that features are read in.
        what: the config key that asked for it, for the warning.

    Returns:
        The number of modules compiled.
    """
    parts = _without(network, set(read))
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    problem = _problem(device.type)
    if problem:
        logger.warning(f"{what} is on, but has no effect, because torch.compile does not work here: {problem}")
        return 0
    # How often the code of one function may be compiled (later torch: recompile_limit). All blocks of a kind share it.
    torch._dynamo.config.cache_size_limit += _MODES * len(parts)
    for part in parts:
        part.compile(dynamic=True)
    return len(parts)


def _without(module: nn.Module, read: set) -> List[nn.Module]:
    if module in read:
        return []
    if not any(submodule in read for submodule in module.modules()):
        # A single layer has nothing to be fused with.
        is_worth_it = any(True for _ in module.children()) and any(True for _ in module.parameters())
        return [module] if is_worth_it else []
    return [part for child in module.children() for part in _without(child, read)]


@cache
def _problem(device_type: str) -> str:
    """Return why torch.compile does not work for a kind of device; "" if it does."""
    try:
        torch.compile(_probe)(torch.ones(2, device=device_type))
    except Exception as e:  # each backend raises its own kinds
        return first_line(e)
    return ""


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
