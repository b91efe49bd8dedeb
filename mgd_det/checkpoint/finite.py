"""A check that all tensors of a state are finite."""

from typing import Any, List, Mapping

from torch import Tensor


def non_finite_tensors(state: Any, name: str = "") -> List[str]:
    """Return the names of the tensors with an infinite or NaN value, such as "model.conv.weight".

    Plain numbers are not checked: the scale of a gradient scaler or the best score so far may be infinite.

    Args:
        state: tensors of any dtype and device in nested mappings, lists and tuples.
        name: the name of ``state`` itself.
    """
    if isinstance(state, Tensor):
        return [] if state.isfinite().all() else [name]
    if not isinstance(state, (Mapping, list, tuple)):
        return []
    items = state.items() if isinstance(state, Mapping) else enumerate(state)
    prefix = f"{name}." if name else ""
    return [found for key, value in items for found in non_finite_tensors(value, f"{prefix}{key}")]
