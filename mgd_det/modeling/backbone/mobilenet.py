"""The MobileNets as Detectron2 backbones, on torchvision's own blocks.

The stages in torchvision's ``features``, and their channels at ``width_mult`` 1.0; a stage ends where the next block
halves the map, as FPN defines stages:

======  ======  ============  ============  ===============  ===============
stage   stride  V1            V2            V3-Large         V3-Small
======  ======  ============  ============  ===============  ===============
stem    2       0..1: 64      0..1: 16      0..1: 16         0: 16
res2    4       2..3: 128     2..3: 24      2..3: 24         1: 16
res3    8       4..5: 256     4..6: 32      4..6: 40         2..3: 24
res4    16      6..11: 512    7..13: 96     7..12: 112       4..8: 48
res5    32      12..13: 1024  14..17: 320   13..15: 160      9..11: 96
======  ======  ============  ============  ===============  ===============

torchvision's last 1x1 convolution of V2 and V3 serves its classifier only and is left out.
"""

from typing import Any, Callable, ClassVar, Dict, List, Sequence, Tuple

import torchvision
from detectron2.config import configurable
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.ops import Conv2dNormActivation

from mgd_det.distillation.features import FeatureSpec
from mgd_det.errors import UserError
from mgd_det.modeling.backbone.norms import Norm
from mgd_det.modeling.backbone.staged_backbone import STAGE_NAMES, Stage, StagedBackbone, set_input_channels


class _MobileNet(StagedBackbone):
    """Base of the MobileNets: the constructor, and layers ``features.0``, ``features.1``, ...

    Of an image of H x W pixels, which may have any size, a map has ceil(H / stride) x ceil(W / stride) places.
    """

    config_key = "MODEL.MOBILENETS"
    # One past the last index in `features` of each stage, stem to res5.
    _stops: ClassVar[Tuple[int, ...]]
    # Builds torchvision's network.
    _network: ClassVar[Callable[..., Any]]

    @configurable
    def __init__(
        self,
        *,
        norm: Norm = "FrozenBN",
        width_mult: float = 1.0,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        in_channels: int = 3,
    ) -> None:
        """
        Args:
            width_mult: factor of every layer's channels, > 0; results are rounded to multiples of 8.
            norm, out_features, freeze_at: see :class:`StagedBackbone`.
            in_channels: channels of the input image, > 0.

        Raises:
            UserError: a value that is not listed above.
        """
        if not width_mult > 0:
            raise UserError(f"MODEL.MOBILENETS.WIDTH_MULT is {width_mult!r}; give a number > 0")
        features = self._features(width_mult)
        set_input_channels(features, in_channels)
        stages = []
        for i, (name, stop) in enumerate(zip(STAGE_NAMES, self._stops)):
            blocks = range(self._stops[i - 1] if i else 0, stop)
            last_conv = [m for m in features[stop - 1].modules() if isinstance(m, nn.Conv2d)][-1]
            stages.append(Stage(name, tuple(f"features.{j}" for j in blocks), last_conv.out_channels, 2 ** (i + 1)))
        network = nn.ModuleDict({"features": features})
        super().__init__(network, stages, norm=norm, out_features=out_features, freeze_at=freeze_at)

    @classmethod
    def _features(cls, width_mult: float) -> nn.Sequential:
        """Return the network's layers, with batch norms, for RGB images."""
        features: nn.Sequential = cls._network(num_classes=1, width_mult=width_mult).features
        return features  # the classifier is dropped, so its size does not matter

    def distillation_features(self) -> Dict[str, FeatureSpec]:
        """Return the features that each stage offers to a distillation position.

        "resN" is the output of the stage's last block, a linear bottleneck: no activation follows it. Where the block
        adds its input, the norm layer describes the residual branch alone, as in a ResNet. "resN.expansion" is what
        the same block expands to, before its activation: nothing is added there. A block that does not expand (res2 of
        V3-Small) has none. All have the stage's stride.

        Returns:
            :class:`FeatureSpec` by name, shallow to deep, of the stages that this backbone has.
        """
        features = {}
        for stage in self.built_stages[1:]:
            # The layers are expansion (in most blocks), depthwise, squeeze-excitation (in some of V3), projection.
            block: Any = self.get_submodule(stage.modules[-1])
            name, layers = next(block.named_children())
            path = f"{stage.modules[-1]}.{name}"
            if layers[0][0].groups == 1:
                features[f"{stage.name}.expansion"] = FeatureSpec(f"{path}.0", True, norm=f"{path}.0.1")
            # In V2 the projection's norm layer is a layer of the block, in V3 the projection owns it.
            norm = f"{path}.{len(layers) - 1}" + (".1" if isinstance(layers[-1], Conv2dNormActivation) else "")
            features[stage.name] = FeatureSpec(stage.modules[-1], False, norm=norm)
        return features


class MobileNetV1(_MobileNet):
    """MobileNet (Howard et al., arXiv:1704.04861, Table 1) without its classifier.

    torchvision does not have it, so the names are this project's: ``features.0`` is the first convolution,
    ``features.N.0`` and ``features.N.1`` are the depthwise and the pointwise one of block N, each with batch norm and
    ReLU6.
    """

    _stops = (2, 4, 6, 12, 14)

    @classmethod
    def _features(cls, width_mult: float) -> nn.Sequential:
        blocks = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        channels = InvertedResidualConfig.adjust_channels(32, width_mult)
        layers: List[nn.Module] = [Conv2dNormActivation(3, channels, stride=2, activation_layer=nn.ReLU6)]
        for full_width, stride in blocks:
            width = InvertedResidualConfig.adjust_channels(full_width, width_mult)
            depthwise = Conv2dNormActivation(
                channels, channels, stride=stride, groups=channels, activation_layer=nn.ReLU6
            )
            pointwise = Conv2dNormActivation(channels, width, kernel_size=1, activation_layer=nn.ReLU6)
            layers.append(nn.Sequential(depthwise, pointwise))
            channels = width
        features = nn.Sequential(*layers)
        for module in features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        return features

    def distillation_features(self) -> Dict[str, FeatureSpec]:
        """Return the feature "resN" of each stage: its last pointwise convolution and batch norm, before the ReLU6.

        Returns:
            :class:`FeatureSpec` by name, shallow to deep, of the stages that this backbone has.
        """
        paths = {stage.name: stage.modules[-1] for stage in self.built_stages[1:]}
        return {stage: FeatureSpec(f"{path}.1", True, norm=f"{path}.1.1") for stage, path in paths.items()}


class MobileNetV2(_MobileNet):
    """MobileNetV2 (Sandler et al., CVPR 2018, Table 2) without its classifier.

    The layers are torchvision's and sit under the same names, so a state dict of
    ``torchvision.models.mobilenet_v2`` loads as it is, its ``features.18`` and ``classifier`` aside.
    """

    _stops = (2, 4, 7, 14, 18)
    _network = staticmethod(torchvision.models.MobileNetV2)


class MobileNetV3Large(_MobileNet):
    """MobileNetV3-Large (Howard et al., ICCV 2019, Table 1) without its classifier.

    The layers are torchvision's and sit under the same names, so a state dict of
    ``torchvision.models.mobilenet_v3_large`` loads as it is, its ``features.16`` and ``classifier`` aside.
    """

    _stops = (2, 4, 7, 13, 16)
    _network = staticmethod(torchvision.models.mobilenet_v3_large)


class MobileNetV3Small(_MobileNet):
    """MobileNetV3-Small (Howard et al., ICCV 2019, Table 2) without its classifier.

    The layers are torchvision's and sit under the same names, so a state dict of
    ``torchvision.models.mobilenet_v3_small`` loads as it is, its ``features.12`` and ``classifier`` aside.
    """

    _stops = (1, 2, 4, 9, 12)
    _network = staticmethod(torchvision.models.mobilenet_v3_small)
