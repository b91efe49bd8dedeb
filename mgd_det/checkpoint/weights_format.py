"""What a format of weights from elsewhere is."""

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
    """A network, or a family of networks, by the names that a library gives to its tensors.

    Names in the model are those of a Detectron2 backbone with FPN: "bottom_up.res2.0.conv1.weight",
    "fpn_lateral3.bias", "top_block.p6.weight". Where a model has no FPN, its backbone counts as "bottom_up".

    Attributes:
        name: what the format is, for messages: "a ResNet of torchvision or timm".
        rename: from the names in a file, and the names in the model, to the name in the model of each tensor that
            belongs to the backbone, whether this model has it or not; None where the file has another format.
        adjust: from the file's tensors to those that compute the same in Detectron2's layers, where they differ.
            It leaves the tensors that it is given unchanged.
    """

    name: str
    rename: Rename
    adjust: Optional[Adjust] = None


def all_fit(names: Iterable[str], pattern: Pattern[str], required: AbstractSet[str]) -> bool:
    """Whether every name matches the whole pattern and none of the required ones lacks.

    Every name, for networks share some of theirs: half a match would leave layers at random without a word.
    """
    names = set(names)
    return required <= names and all(pattern.fullmatch(name) for name in names)


def without_counts(names: Iterable[str]) -> List[str]:
    """The names without the norm layers' counts of batches, which change no output."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def number_pattern(name: str) -> str:
    """The name with "#" for each number: the same for the same layer of all blocks."""
    return re.sub(r"\d+", "#", name)
