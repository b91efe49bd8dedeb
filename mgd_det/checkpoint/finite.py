"""Whether all tensors of a state are finite numbers."""

from typing import Any, Dict, Iterator, List, Mapping, Tuple

import torch
from torch import Tensor


def non_finite_tensors(state: Any) -> List[str]:
    """Return the names of the tensors with an infinite or NaN value, such as "model.conv.weight".

    Each device is waited for once. Plain numbers are not checked: the scale of a gradient scaler or the best score so
    far may be infinite.

    Args:
        state: mappings, lists and tuples, nested, with tensors of any dtype and device.
    """
    by_device: Dict[torch.device, List[Tuple[str, Tensor]]] = {}
    for name, tensor in _tensors(state, ""):
        if tensor.is_floating_point() or tensor.is_complex():
            by_device.setdefault(tensor.device, []).append((name, tensor))
    found: List[str] = []
    for named in by_device.values():
        finite = torch.stack([tensor.detach().isfinite().all() for _, tensor in named]).tolist()
        found += [name for (name, _), is_finite in zip(named, finite) if not is_finite]
    return found


def _tensors(state: Any, name: str) -> Iterator[Tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, (Mapping, list, tuple)):
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
