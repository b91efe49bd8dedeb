"""The formats of weights that other libraries write."""

from dataclasses import dataclass
from typing import AbstractSet, Callable, Dict, Iterable, List, Optional, Pattern, Sequence

from torch import Tensor

# A regular expression for the tensors of a batch norm.
NORM = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"

Rename = Callable[[Sequence[str], AbstractSet[str]], Optional[Dict[str, str]]]
Adjust = Callable[[Dict[str, Tensor]], Dict[str, Tensor]]


@dataclass(frozen=True)
class WeightsFormat:
    """A family of networks with the names that a library gives to its tensors.

    Names in the model are those of a Detectron2 backbone with FPN: "bottom_up.res2.0.conv1.weight",
    "fpn_lateral3.bias", "top_block.p6.weight". If a model has no FPN, its backbone counts as "bottom_up".

    Attributes:
        name: the format in messages: "a ResNet of torchvision or timm".
        rename: takes the names in a file and in the model. It returns the name in the model for each tensor of the
            backbone, even if this model lacks it, or None if the file has another format.
        adjust: returns a copy of the file's tensors with which Detectron2's layers compute the same.
    """

    name: str
    rename: Rename
    adjust: Optional[Adjust] = None  # None: no change


def all_fit(names: Iterable[str], pattern: Pattern[str], required: AbstractSet[str]) -> bool:
    """Return whether every name matches the pattern and no required name is missing.

    Networks share some names, so a partial match would silently leave layers at random values.
    """
    names = set(names)
    return required <= names and all(pattern.fullmatch(name) for name in names)


def without_counts(names: Iterable[str]) -> List[str]:
    """Return the names without the norm layers' counts of batches, which change no output."""
    return [name for name in names if not name.endswith("num_batches_tracked")]
