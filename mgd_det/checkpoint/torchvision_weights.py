"""torchvision's ImageNet weights as the starting point of a detector's backbone.

torchvision's networks were trained on RGB images scaled to 0..1, so a detector that starts from them wants
``INPUT.FORMAT: "RGB"``, ``MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53]`` and
``MODEL.PIXEL_STD: [58.395, 57.12, 57.375]``; a ResNet also ``MODEL.RESNETS.STRIDE_IN_1X1: False``.
"""

import difflib
import logging
import re
from typing import Dict, Iterable, Optional

import torchvision
from torch import Tensor

from mgd_det.errors import UserError

__all__ = ["convert_torchvision_weights", "is_torchvision_weights", "torchvision_weights_url"]

SCHEME = "torchvision://"
# torchvision's names of the networks whose weights can be converted.
MODEL_NAMES = ("mobilenet_v2", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# Every key must fit its network's pattern: MobileNetV3, DenseNet, a ResNet with squeeze-and-excitation and
# others share some of the names, and half a match would leave layers at random without a word.
_NORM = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
_RESNET_KEY = re.compile(
    r"conv1\.weight|fc\.(?:weight|bias)"
    rf"|bn1\.{_NORM}"
    rf"|layer[1-4]\.\d+\.(?:conv[123]\.weight|bn[123]\.{_NORM}|downsample\.0\.weight|downsample\.1\.{_NORM})"
)
_RESNET_REQUIRED = {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"}
_MOBILENETV2_KEY = re.compile(
    r"classifier\.1\.(?:weight|bias)"
    rf"|features\.(?:0|18)\.(?:0\.weight|1\.{_NORM})"
    rf"|features\.\d+\.conv\.(?:[01]\.0\.weight|[01]\.1\.{_NORM}|[12]\.weight|[23]\.{_NORM})"
)
_MOBILENETV2_REQUIRED = {"features.0.0.weight", "features.1.conv.0.0.weight", "features.17.conv.0.0.weight"}

logger = logging.getLogger(__name__)


def is_torchvision_weights(state_dict: Dict[str, Tensor]) -> bool:
    """Whether :func:`convert_torchvision_weights` takes this state dict.

    Args:
        state_dict: tensors by name, of any origin.

    Returns:
        True for a ResNet or a MobileNetV2 with the names that torchvision gives, with or without their
        classifier; False for all else, a converted or a Detectron2 state dict included.
    """
    return _network(state_dict) is not None


def convert_torchvision_weights(
    state_dict: Dict[str, Tensor], prefix: str = "backbone.bottom_up."
) -> Dict[str, Tensor]:
    """Renames torchvision's classification weights to those of a detector's bottom-up network.

    A ResNet gets the names of :class:`detectron2.modeling.ResNet` ("layer1.0.downsample.1.bias" becomes
    "res2.0.shortcut.norm.bias"). MobileNetV2 keeps its names, for this project's own has the same. The
    classifier, the last convolution of MobileNetV2, which only the classifier reads, and the norm layers'
    ``num_batches_tracked`` are left out.

    Args:
        state_dict: ``state_dict()`` of a torchvision ResNet (18 to 152) or MobileNetV2.
        prefix: what the bottom-up's names begin with in the detector; "backbone.bottom_up." under FPN,
            "backbone." where the network is the whole backbone.

    Returns:
        A new dict, in the order of ``state_dict``, of the same tensors (not copied).

    Raises:
        UserError: the state dict is of another network.
    """
    network = _network(state_dict)
    if network is None:
        raise UserError(
            "These weights are neither a ResNet's nor a MobileNetV2's of torchvision: among their names are "
            f"{', '.join(list(state_dict)[:3]) or 'none'}. Give weights of one of "
            f"{', '.join(MODEL_NAMES)}, or a checkpoint of Detectron2."
        )
    rename = _resnet_name if network == "ResNet" else _mobilenetv2_name
    converted = {}
    for key, value in state_dict.items():
        new_key = rename(key)
        if new_key is not None:
            converted[prefix + new_key] = value
    logger.info("Converted %d tensors of a torchvision %s.", len(converted), network)
    return converted


def torchvision_weights_url(name: str) -> str:
    """Where to download torchvision's best ImageNet weights of a network.

    Args:
        name: "torchvision://<network>", or the network's name alone, of :data:`MODEL_NAMES`.

    Returns:
        An https URL, for instance for ``detectron2.utils.file_io.PathManager.get_local_path``.

    Raises:
        UserError: no such network, or one that this project cannot convert.
    """
    model = name[len(SCHEME) :] if name.startswith(SCHEME) else name
    if model not in MODEL_NAMES:
        close = difflib.get_close_matches(model.lower(), MODEL_NAMES, n=2, cutoff=0.6)
        hint = " Did you mean " + " or ".join(SCHEME + match for match in close) + "?" if close else ""
        raise UserError(
            f"There are no torchvision weights by the name {name!r} that can be imported.{hint} "
            f"Choose from {', '.join(SCHEME + known for known in MODEL_NAMES)}."
        )
    return torchvision.models.get_model_weights(model).DEFAULT.url


def _network(keys: Iterable[str]) -> Optional[str]:
    names = set(keys)
    for network, pattern, required in (
        ("ResNet", _RESNET_KEY, _RESNET_REQUIRED),
        ("MobileNetV2", _MOBILENETV2_KEY, _MOBILENETV2_REQUIRED),
    ):
        if required <= names and all(pattern.fullmatch(name) for name in names):
            return network
    return None


def _resnet_name(key: str) -> Optional[str]:
    """Detectron2's name for a tensor of torchvision's ResNet; None for one that is left out."""
    if key.startswith("fc.") or key.endswith(".num_batches_tracked"):
        return None
    if not key.startswith("layer"):
        key = f"stem.{key}"
    key = re.sub(r"^layer(\d)", lambda match: f"res{int(match.group(1)) + 1}", key)
    key = key.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")
    return re.sub(r"\.bn(\d)\.", r".conv\1.norm.", key)


def _mobilenetv2_name(key: str) -> Optional[str]:
    """The name of a tensor of torchvision's MobileNetV2, unchanged; None for one that is left out."""
    if key.startswith(("classifier.", "features.18.")) or key.endswith(".num_batches_tracked"):
        return None
    return key
