"""The formats of weights that other libraries write."""

import re
from dataclasses import dataclass
from typing import AbstractSet, Callable, Dict, Iterable, List, Optional, Pattern, Sequence

from torch import Tensor

# A regular expression for the tensors of a batch norm.
NORM = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"

Rename = Callable[[Sequence[str], AbstractSet[str]], Optional[Dict[str, str]]]
Adjust = Callable[[Dict[str, Tensor]], Dict[str, Tensor]]


@dataclass(frozen=True)
class WeightsFormat:
    """A network, or a family of networks, with the names that a library gives to its tensors.

    Names in the model are those of a Detectron2 backbone with FPN: "bottom_up.res2.0.conv1.weight",
    "fpn_lateral3.bias", "top_block.p6.weight". If a model has no FPN, its backbone counts as "bottom_up".

    Attributes:
        name: the format in messages: "a ResNet of torchvision or timm".
        rename: takes the names in a file and in the model; returns, for each tensor of the backbone, its name in the
            model, whether this model has it or not, or None if the file has another format.
        adjust: returns the file's tensors changed so that Detectron2's layers compute the same; None if they need no
            change. It does not modify its argument.
    """

    name: str
    rename: Rename
    adjust: Optional[Adjust] = None


def all_fit(names: Iterable[str], pattern: Pattern[str], required: AbstractSet[str]) -> bool:
    """Return whether every name matches the whole pattern and all the required ones are there.

    Networks share some names: a partial match would silently leave layers at random values.
    """
    names = set(names)
    return required <= names and all(pattern.fullmatch(name) for name in names)


def without_counts(names: Iterable[str]) -> List[str]:
    """Return the names without the norm layers' counts of batches, which change no output."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def number_pattern(name: str) -> str:
    """Return the name with "#" for each number, which is the same for a layer of all blocks."""
    return re.sub(r"\d+", "#", name)
