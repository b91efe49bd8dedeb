"""Conv-BN fusion: saves a pass over each map in a network that is not trained."""

from typing import Any, Iterator, Optional, Tuple

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# By exact type: a subclass may do more in its forward (timm's BatchNormAct2d: an activation).
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, NaiveSyncBatchNorm)


@torch.no_grad()
def fuse_conv_bn(network: nn.Module) -> int:
    """Fold the batch norms of a network in eval mode into its convolutions, in place.

    With running mean mu and variance v, weight g and bias b, a convolution (w, c) becomes
    ``(w * g / sqrt(v + eps), (c - mu) * g / sqrt(v + eps) + b)``. This is computed in float64 and rounded once, so
    that in float32 a feature changes by some 1e-6 of its largest value.

    It finds the norm layer of Detectron2's :class:`Conv2d`, and a batch norm right after a convolution in an
    ``nn.Sequential``. Other norm layers and modules with hooks stay as they are. It assumes that every module is used
    in one place only.

    Returns:
        The number of norm layers removed.
    """
    # Listed first, because the loop replaces modules.
    pairs = list(_foldable(network))
    for owner, name, convolution, norm in pairs:
        weight, bias = fuse_conv_bn_weights(
            convolution.weight.double(),
            _double(convolution.bias),
            norm.running_mean.double(),
            norm.running_var.double(),
            norm.eps,
            _double(norm.weight),
            _double(norm.bias),
        )
        learned = convolution.weight.requires_grad
        convolution.weight, convolution.bias = (
            nn.Parameter(value.to(convolution.weight), requires_grad=learned) for value in (weight, bias)
        )
        # Detectron2's Conv2d checks whether it has a norm; a Sequential runs all its modules.
        setattr(owner, name, None if owner is convolution else nn.Identity())
    return len(pairs)


def _foldable(network: nn.Module) -> Iterator[Tuple[nn.Module, str, Any, Any]]:
    """Yield (owner of the norm layer, its name there, convolution, norm layer) of each pair."""
    for module in network.modules():
        if type(module) is Conv2d and _is_batch_norm(module.norm):
            yield module, "norm", module, module.norm
        if type(module).forward is nn.Sequential.forward:
            children = list(module.named_children())
            for (_, convolution), (name, norm) in zip(children, children[1:]):
                if _is_plain_convolution(convolution) and _is_batch_norm(norm):
                    yield module, name, convolution, norm


def _is_batch_norm(norm: Any) -> bool:
    if type(norm) not in BATCH_NORMS or norm.running_mean is None or norm.training:
        return False
    return not _is_read(norm)


def _is_plain_convolution(module: nn.Module) -> bool:
    if type(module) is Conv2d:
        return module.norm is None and module.activation is None and not _is_read(module)
    return type(module) is nn.Conv2d and not _is_read(module)


def _is_read(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _double(parameter: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if parameter is None else parameter.double()
