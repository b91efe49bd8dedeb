"""MobileNetV2 as a Detectron2 backbone, on torchvision's own blocks.

Shape shorthand in this module: B images, C channels, H and W pixels of the input.
"""

import math
from typing import Any, Callable, Dict, List, Sequence, Tuple, Union

import torch
import torchvision
from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone
from torch import nn

from mgd_det.distillation.features import FeatureSpec
from mgd_det.errors import UserError

__all__ = ["MobileNetV2"]

# Name, first and one past the last index in torchvision's `features`, and output stride of each stage.
# A stage ends where the next block halves the map, as FPN defines stages. torchvision's last entry,
# the 1x1 convolution to 1280 channels, serves its classifier only and is left out.
_STAGES: Tuple[Tuple[str, int, int, int], ...] = (
    ("stem", 0, 2, 2),
    ("res2", 2, 4, 4),
    ("res3", 4, 7, 8),
    ("res4", 7, 14, 16),
    ("res5", 14, 18, 32),
)
_STAGE_NAMES = tuple(stage[0] for stage in _STAGES)


class MobileNetV2(Backbone):
    """MobileNetV2 (Sandler et al., CVPR 2018, Table 2) without its classifier.

    The layers are torchvision's and sit under the same names, so a state dict of
    ``torchvision.models.mobilenet_v2`` loads as it is, its ``features.18`` and ``classifier`` aside.

    ======  ========  ======  ================================
    stage   features  stride  channels at ``width_mult`` 1.0
    ======  ========  ======  ================================
    stem    0..1      2       16
    res2    2..3      4       24
    res3    4..6      8       32
    res4    7..13     16      96
    res5    14..17    32      320
    ======  ========  ======  ================================

    A map of an image of H x W pixels has ceil(H / stride) x ceil(W / stride) positions: any size will do.
    """

    @configurable
    def __init__(
        self,
        *,
        norm: Union[str, Callable[[int], nn.Module]] = "FrozenBN",
        width_mult: float = 1.0,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        in_channels: int = 3,
    ) -> None:
        """
        Args:
            norm: norm layers, "FrozenBN", "BN", "SyncBN", "GN" or another name that
                :func:`detectron2.layers.get_norm` knows, or a function from a number of channels to a
                layer. "GN" has 32 groups, or gcd(32, channels) where 32 does not divide the channels.
            width_mult: factor of every layer's channels, > 0; results are rounded to multiples of 8.
            out_features: features to return, of "stem", "res2", "res3", "res4", "res5". Stages after the
                deepest of them are not built.
            freeze_at: number of stages to freeze, 0 to 5; see :meth:`freeze`.
            in_channels: channels of the input image, > 0.

        Raises:
            UserError: a value outside of what is listed above.
        """
        super().__init__()
        _check_arguments(width_mult, out_features, freeze_at, in_channels)

        # OmegaConf's lists come in through LazyConfig; keep the backbone free of them.
        self._out_features: List[str] = [str(name) for name in out_features]
        kept = _STAGES[: 1 + max(_STAGE_NAMES.index(name) for name in self._out_features)]

        # The classifier is thrown away, so its size is of no account.
        net = torchvision.models.MobileNetV2(num_classes=1, width_mult=width_mult, norm_layer=_norm_builder(norm))
        self.features = net.features[: kept[-1][2]]
        if in_channels != 3:
            self.features[0][0] = _first_conv(in_channels, self.features[0].out_channels)

        self._out_feature_strides = {name: stride for name, _, _, stride in kept}
        self._out_feature_channels = {name: int(self.features[stop - 1].out_channels) for name, _, stop, _ in kept}
        self._stage_of_last_block: Dict[int, str] = {stop - 1: name for name, _, stop, _ in kept}
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> Dict[str, Any]:
        """Reads MODEL.MOBILENETS and MODEL.BACKBONE.FREEZE_AT."""
        return {
            "norm": cfg.MODEL.MOBILENETS.NORM,
            "width_mult": cfg.MODEL.MOBILENETS.WIDTH_MULT,
            "out_features": cfg.MODEL.MOBILENETS.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "in_channels": input_shape.channels,
        }

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """
        Args:
            x: images, (B, in_channels, H, W).

        Returns:
            ``out_features`` by name; each (B, C, ceil(H / stride), ceil(W / stride)), with the channels
            and the stride that :meth:`output_shape` declares.
        """
        assert x.dim() == 4, f"MobileNetV2 takes images of shape (B, C, H, W), not {x.shape}"
        outputs: Dict[str, torch.Tensor] = {}
        for i, block in enumerate(self.features):
            x = block(x)
            if i in self._stage_of_last_block:
                name = self._stage_of_last_block[i]
                if name in self._out_features:
                    outputs[name] = x
        return outputs

    def freeze(self, freeze_at: int = 0) -> "MobileNetV2":
        """Freezes the first stages, as :meth:`detectron2.modeling.ResNet.freeze` does.

        Their parameters stop requiring gradients, and their batch norms become
        :class:`FrozenBatchNorm2d`. Other norm layers stay what they are, with frozen parameters.

        Args:
            freeze_at: 0 for none, 1 for the stem (all that comes before res2), 2 for the stem and res2,
                and so on up to 5, all.

        Returns:
            This backbone.
        """
        for _, start, stop, _ in _STAGES[:freeze_at]:
            for block in self.features[start:stop]:
                for parameter in block.parameters():
                    parameter.requires_grad = False
                FrozenBatchNorm2d.convert_frozen_batchnorm(block)
        return self

    def distillation_features(self) -> Dict[str, FeatureSpec]:
        """The two features that each stage offers to a distillation position.

        "resN" is the output of the stage's last block, a linear bottleneck: no ReLU follows it. In res2 to
        res4 that output is a sum with the block's input, so its norm layer describes the residual branch
        alone, as in a ResNet. "resN.expansion" is what the same block expands to, six times its input's
        channels, before its ReLU6: nothing is added there. Both have the stage's stride.

        Returns:
            :class:`FeatureSpec` by name, shallow to deep, of the stages that this backbone has.
        """
        features = {}
        for last, stage in self._stage_of_last_block.items():
            if stage == "stem":
                continue
            path = f"features.{last}.conv"
            features[f"{stage}.expansion"] = FeatureSpec(module=f"{path}.0", before_activation=True, norm=f"{path}.0.1")
            features[stage] = FeatureSpec(
                module=f"features.{last}",
                before_activation=False,
                norm=f"{path}.{len(self.features[last].conv) - 1}",
            )
        return features


def _check_arguments(width_mult: float, out_features: Sequence[str], freeze_at: int, in_channels: int) -> None:
    assert in_channels > 0, f"in_channels must be > 0, not {in_channels}"
    if isinstance(out_features, str) or not out_features:
        raise UserError(
            f"MODEL.MOBILENETS.OUT_FEATURES must be a list with at least one name, not {out_features!r}. "
            f"Choose from {', '.join(_STAGE_NAMES)}."
        )
    for name in out_features:
        if name not in _STAGE_NAMES:
            raise UserError(
                f"MODEL.MOBILENETS.OUT_FEATURES names {name!r}, which MobileNetV2 does not have. "
                f"Choose from {', '.join(_STAGE_NAMES)}."
            )
    if freeze_at not in range(len(_STAGES) + 1):
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at!r}. For MobileNetV2 it must be a whole number from 0 "
            f"(nothing frozen) to {len(_STAGES)} (all of it: {', '.join(_STAGE_NAMES)})."
        )
    if not width_mult > 0:
        raise UserError(f"MODEL.MOBILENETS.WIDTH_MULT must be > 0, not {width_mult!r}.")


def _norm_builder(norm: Union[str, Callable[[int], nn.Module]]) -> Callable[[int], nn.Module]:
    """A function from a number of channels to a norm layer, as torchvision wants it."""
    if norm == "GN":
        # Detectron2's 32 groups divide neither the 16 nor the 24 channels of the first blocks.
        return lambda channels: nn.GroupNorm(math.gcd(32, channels), channels)
    try:
        is_layer = isinstance(get_norm(norm, 8), nn.Module)
    except KeyError:
        is_layer = False
    if not is_layer:
        # "" (no norm) is among these: torchvision's blocks always have norm layers.
        raise UserError(
            f"MODEL.MOBILENETS.NORM is {norm!r}, which is no norm layer of MobileNetV2. "
            "Choose from FrozenBN, BN, SyncBN, GN."
        )
    return lambda channels: get_norm(norm, channels)


def _first_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """The network's first convolution for images that are not RGB, initialised as torchvision does."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv
