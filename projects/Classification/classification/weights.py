"""Weights of torchvision's classifiers, and of MoCo-v2, under the names of this project's models."""

from typing import Any, Dict

import torch

from mgd_det.checkpoint.safe_loading import load_safetensors, load_torch_file
from mgd_det.checkpoint.sources import fetch_named_weights, is_named
from mgd_det.checkpoint.torchvision_weights import rename_resnet
from mgd_det.errors import UserError
from mgd_det.files.downloads import local_copy

_MOCO_PREFIX = "module.encoder_q."
# By a tensor that only this network has: the prefix of its last convolution, and that of its classifier.
_KEPT_NAMES = {
    "features.1.conv.0.0.weight": ("features.18.", "classifier.1."),  # MobileNetV2
    "stage2.0.branch1.0.weight": ("conv5.", "fc."),  # ShuffleNetV2
}


def read_weights(source: str) -> Dict[str, torch.Tensor]:
    """Read tensors by their own names.

    Args:
        source: "torchvision://<model>" (its best weights), the URL of a file, or a path. The tensors may be in an entry
            "state_dict" or "model".

    Raises:
        UserError: the file cannot be read.
    """
    if is_named(source):
        return fetch_named_weights(source)
    try:
        path = local_copy(source)
        content: Any = load_safetensors(path) if path.endswith(".safetensors") else load_torch_file(path)
    except UserError:
        raise
    except Exception as e:  # of the download, the disk, zip, pickle and torch
        raise UserError(f"weights {source} cannot be read: {type(e).__name__}: {e}") from e
    for entry in ("state_dict", "model"):
        content = content.get(entry, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise UserError(f"weights {source} hold no tensors by name: give a checkpoint with an entry 'state_dict'")
    return content


def renamed(tensors: Dict[str, torch.Tensor], source: str) -> Dict[str, torch.Tensor]:
    """Rename tensors for :class:`Classifier`, or those of MoCo-v2 for :class:`MoCo`.

    A ResNet, MobileNetV2 or ShuffleNetV2 of torchvision gives "backbone.*", "last_conv.*" and "linear.*". The query
    encoder of MoCo-v2 ("module.encoder_q.*") gives "backbone.*" and "head.*"; key encoder and queue are left out.

    Args:
        tensors: as :func:`read_weights` returns them.
        source: named in the error.

    Raises:
        UserError: the tensors are of another network.
    """
    is_moco = any(name.startswith(_MOCO_PREFIX) for name in tensors)
    if is_moco:
        tensors = {
            name.removeprefix(_MOCO_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_MOCO_PREFIX)
        }
    backbone = [name for name in tensors if not name.startswith("fc.")]
    of_resnet = rename_resnet(backbone)
    prefixes = {"fc.": "head." if is_moco else "linear."}
    if of_resnet is None:
        known = next((kept for name, kept in _KEPT_NAMES.items() if name in tensors and not is_moco), None)
        if known is None:
            raise UserError(
                f"weights {source} are not of a ResNet, MobileNetV2 or ShuffleNetV2 of torchvision, or of MoCo-v2 with "
                f"a ResNet; their first tensors are {', '.join(list(tensors)[:3])}"
            )
        prefixes = dict(zip(known, ("last_conv.", "linear.")))
    result = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None:
            result[prefixes[prefix] + name.removeprefix(prefix)] = tensor
        else:
            new = name if of_resnet is None else of_resnet[name].removeprefix("bottom_up.")
            result[f"backbone.{new}"] = tensor
    return result
