"""Conversion of weights of torchvision and timm to the names of a model."""

import logging
import re
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence

from torch import Tensor

from mgd_det.checkpoint.timm_weights import MOBILENETV1, TIMM
from mgd_det.checkpoint.torchvision_detectors import DETECTOR
from mgd_det.checkpoint.torchvision_weights import MOBILENETV2, MOBILENETV3, RESNET, SHUFFLENETV2
from mgd_det.checkpoint.weights_format import WeightsFormat, without_counts
from mgd_det.errors import UserError

FORMATS = (DETECTOR, RESNET, MOBILENETV2, MOBILENETV3, SHUFFLENETV2, MOBILENETV1, TIMM)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """Weights by the names of the model.

    Attributes:
        tensors: by name in the model.
        left_out: names in the file of the tensors that the model lacks, such as the classifier.
    """

    tensors: Dict[str, Tensor]
    left_out: List[str]


def convert_weights(state_dict: Dict[str, Tensor], model: Mapping[str, Tensor]) -> Optional[Converted]:
    """Convert weights to the names of a detector, or of a backbone alone.

    If the weights fit several formats, as timm's ResNets do, the format that fills most of the model is used.

    Args:
        state_dict: tensors by name, from any library. It is not modified.
        model: ``state_dict()`` of the model to load them into.

    Returns:
        None if the weights have none of :data:`FORMATS`. They may have Detectron2's names already.

    Raises:
        UserError: the weights are of a known network, but not of the model's backbone.
    """
    places = _backbone_names(model)

    def fitting(renamed: Mapping[str, str]) -> int:
        return sum(new in places for new in renamed.values())

    renamings = [(format_, format_.rename(list(state_dict), places.keys())) for format_ in FORMATS]
    candidates = [(format_, renamed) for format_, renamed in renamings if renamed is not None]
    if not candidates:
        return None
    format_, renamed = max(candidates, key=lambda candidate: fitting(candidate[1]))
    if not fitting(renamed):
        raise UserError(
            f"they are weights of {format_.name}, with names such as {next(iter(renamed))}, and fit none of the "
            f"model's {len(model)} tensors, such as {next(iter(model), '-')}: the model's backbone is another network"
        )
    _check_same_network(format_, renamed, places, state_dict, model)
    if format_.adjust is not None:
        state_dict = format_.adjust(state_dict)
    tensors = {places[new]: state_dict[old] for old, new in renamed.items() if new in places}
    left_out = [name for name in state_dict if renamed.get(name) not in places]
    logger.info(f"Converted {len(tensors)} of {len(state_dict)} tensors of {format_.name}.")
    return Converted(tensors, left_out)


def _backbone_names(model: Mapping[str, Tensor]) -> Dict[str, str]:
    """Return the names of the model's tensors by the names that :class:`WeightsFormat` uses."""
    prefix = "backbone." if any(key.startswith("backbone.") for key in model) else ""
    names = {key[len(prefix) :]: key for key in model if key.startswith(prefix)}
    if not any(name.startswith("bottom_up.") for name in names):
        names = {f"bottom_up.{name}": key for name, key in names.items()}
    return names


def _check_same_network(
    format_: WeightsFormat,
    renamed: Mapping[str, str],
    places: Mapping[str, str],
    file: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
) -> None:
    """Refuse weights of a similar network, which would fill only a part of the backbone.

    Raises:
        UserError: the backbone has tensors or shapes that the file lacks, or lacks blocks of the file.
    """
    shapes = {new: tuple(file[old].shape) for old, new in renamed.items()}
    faults = []
    for name in without_counts(name for name in places if name.startswith("bottom_up.")):
        key = places[name]
        shape = tuple(model[key].shape)
        if name not in shapes:
            # Detectron2's deformable convolutions add offsets, which begin at zero.
            if ".conv2_offset." not in name:
                faults.append(f"{key} is not in the file")
        elif shapes[name] != shape and not _is_first_conv(shapes[name], shape):
            faults.append(f"{key} is {shapes[name]} in the file and {shape} in the model")
    faults += [f"the model does not have {name}" for name in _left_out_in_between(renamed, places)]
    if faults:
        raise UserError(
            f"they are weights of {format_.name}, but not of the model's backbone: {'; '.join(faults[:3])}"
            + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
            + ". Check them against the kind, depth and width of the config's backbone."
        )


def _is_first_conv(in_file: Sequence[int], in_model: Sequence[int]) -> bool:
    """Return whether the shapes differ only in the channels of the images: RGB in the file, others in the model."""
    return len(in_file) == 4 and in_file[1] == 3 and (*in_file[:1], *in_file[2:]) == (*in_model[:1], *in_model[2:])


def _left_out_in_between(renamed: Mapping[str, str], places: Mapping[str, str]) -> List[str]:
    """Return tensors of the file that the model lacks although it has the same layer of a later block.

    A detector may not need the last stage, so a model may end early. But a network with fewer blocks in a stage is
    another network.
    """

    def pattern(name: str) -> str:  # the same for a layer in all blocks
        return re.sub(r"\d+", "#", name)

    def numbers(name: str) -> List[int]:
        return [int(number) for number in re.findall(r"\d+", name)]

    last_used: Dict[str, List[int]] = {}
    for old, new in renamed.items():
        if new in places:
            last_used[pattern(old)] = max(last_used.get(pattern(old), []), numbers(old))
    return [
        old
        for old, new in renamed.items()
        if new.startswith("bottom_up.")
        and new not in places
        and not old.endswith("num_batches_tracked")  # the model's norm layers may lack it
        and numbers(old) < last_used.get(pattern(old), [])
    ]
