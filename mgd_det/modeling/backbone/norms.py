"""Replacement of the batch norms of existing networks by the norm layers of the config."""

import math
from typing import Any, Callable, Union

import torch
from detectron2.layers import FrozenBatchNorm2d, get_norm
from torch import nn

from mgd_det.errors import UserError

# A name that detectron2.layers.get_norm knows, or a function from a number of channels to a layer.
Norm = Union[str, Callable[[int], nn.Module]]


def replace_batch_norms(module: nn.Module, norm: Norm, config_key: str = "norm") -> nn.Module:
    """Replace every :class:`nn.BatchNorm2d` by another norm layer of the same name.

    The new layer takes over weight, bias, running statistics, eps and momentum, as far as it has them. So a frozen or
    synchronised batch norm computes in eval mode what the network's own did. Layers that a subclass of BatchNorm2d
    owns and runs on its result (timm's BatchNormAct2d: an activation) stay, and run as before.

    Args:
        module: a network, changed in place, or a batch norm itself.
        norm: "FrozenBN", "BN", "SyncBN", "GN" or another name that :func:`detectron2.layers.get_norm` knows,
            or a function from a number of channels to a layer. "GN" has 32 groups, or gcd(32, channels) where
            32 does not divide the channels.
        config_key: where ``norm`` comes from, for the error message.

    Returns:
        ``module``, or its replacement if it is a batch norm itself.

    Raises:
        UserError: ``norm`` gives no norm layer.
    """
    build = _norm_builder(norm, config_key)
    if norm == "BN":
        return module

    def successor(batch_norm: Any) -> nn.Module:
        layer = build(batch_norm.num_features)
        _take_over(layer, batch_norm)
        return layer

    return _swap(module, nn.BatchNorm2d, successor)


def freeze_batch_norms(module: nn.Module) -> nn.Module:
    """Turn every batch norm, synchronised or not, into a :class:`FrozenBatchNorm2d`, as Detectron2's ResNet does.

    Layers that a subclass of BatchNorm2d runs on its result stay, as in :func:`replace_batch_norms`.

    Returns:
        ``module``, or its replacement if it is a batch norm itself.
    """
    return _swap(module, (nn.BatchNorm2d, nn.SyncBatchNorm), FrozenBatchNorm2d.convert_frozen_batchnorm)


def _norm_builder(norm: Norm, config_key: str) -> Callable[[int], nn.Module]:
    if norm == "GN":
        # Detectron2's 32 groups do not divide the channels of many narrow layers.
        return lambda channels: nn.GroupNorm(math.gcd(32, channels), channels)
    try:
        is_layer = isinstance(get_norm(norm, 8), nn.Module)
    except KeyError:
        is_layer = False
    if not is_layer:
        # Also for "" (no norm): the networks' convolutions have no bias and need their norm.
        raise UserError(f"{config_key} is {norm!r}, which is not a norm layer; use one of FrozenBN, BN, SyncBN, GN")
    return lambda channels: get_norm(norm, channels)


@torch.no_grad()
def _take_over(layer: nn.Module, batch_norm: nn.Module) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        old, new = getattr(batch_norm, name, None), getattr(layer, name, None)
        if old is not None and new is not None:
            layer.to(old)
            getattr(layer, name).copy_(old)
    for name in ("eps", "momentum"):
        if hasattr(layer, name):
            setattr(layer, name, getattr(batch_norm, name))
    layer.train(batch_norm.training)


def _swap(module: nn.Module, kinds: Any, successor: Callable[[nn.Module], nn.Module]) -> nn.Module:
    if not isinstance(module, kinds):
        for name, child in list(module.named_children()):
            new_child = _swap(child, kinds, successor)
            if new_child is not child:
                module.add_module(name, new_child)
        return module
    layer = successor(module)
    children = list(module.named_children())
    for name, child in children:
        layer.add_module(name, child)
    if children:
        layer.register_forward_hook(_run_children)
    return layer


def _run_children(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    for child in layer.children():
        output = child(output)
    return output
