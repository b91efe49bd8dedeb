"""Networks of the paper's classification experiments that Detectron2 and mgd_det do not have.

======================  ==========================================================================================
function or class       what it is
======================  ==========================================================================================
``resnet``              torchvision's ResNet as Detectron2's class, of any width
``cifar_resnet``        the ResNet for 32 x 32 pixels (He et al., CVPR 2016, section 4.2), three stages
``mobilenet_v1``        mgd_det's MobileNetV1 with ReLU in place of ReLU6, as the authors have it
``DepthwiseMobileNetV2``  MobileNetV2 with the authors' strides and positions
======================  ==========================================================================================
"""

from typing import Any, Dict, List, Sequence

import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from mgd_det.distillation import FeatureSpec
from mgd_det.errors import UserError
from mgd_det.modeling import MobileNetV1
from mgd_det.modeling.backbone import Norm, Stage, StagedBackbone

_BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}


def resnet(
    *,
    depth: int,
    width: int = 64,
    norm: Norm = "BN",
    freeze_at: int = 0,
    out_features: Sequence[str] = ("res5",),
) -> ResNet:
    """Build a ResNet whose strides are in the 3 x 3 convolutions, as torchvision's are.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: channels of the stem and of the 3 x 3 convolutions of res2; > 0. 64 is the paper's.
        norm: "BN", "SyncBN", "FrozenBN"...
        freeze_at: number of stages to freeze, from the stem on; 5 freezes all.
        out_features: of "stem", "res2".."res5".

    Raises:
        UserError: there is no ResNet of this depth, or the width is not > 0.
    """
    if depth not in _BLOCKS:
        raise UserError(f"the depth of a resnet is {depth!r}; use one of {', '.join(map(str, _BLOCKS))}")
    if width < 1:
        raise UserError(f"the width of a resnet is {width!r}; give a whole number > 0")
    is_deep = depth >= 50
    stages, channels = [], width
    for i, blocks in enumerate(_BLOCKS[depth]):
        inner = width * 2**i
        options: Dict[str, Any] = {"bottleneck_channels": inner, "stride_in_1x1": False} if is_deep else {}
        out_channels = 4 * inner if is_deep else inner
        stages.append(
            ResNet.make_stage(
                BottleneckBlock if is_deep else BasicBlock,
                blocks,
                stride_per_block=[1 if i == 0 else 2] + [1] * (blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                norm=norm,
                **options,
            )
        )
        channels = out_channels
    stem = BasicStem(in_channels=3, out_channels=width, norm=norm)
    return ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)


class CifarStem(CNNBlockBase):
    """A 3 x 3 convolution of stride 1 with a norm layer and ReLU: (B, 3, H, W) to (B, C, H, W)."""

    def __init__(self, out_channels: int, norm: Norm = "BN") -> None:
        super().__init__(3, out_channels, 1)
        self.conv1 = Conv2d(3, out_channels, kernel_size=3, padding=1, bias=False, norm=get_norm(norm, out_channels))
        c2_msra_fill(self.conv1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu_(self.conv1(x))


def cifar_resnet(*, depth: int, width: int = 1, norm: Norm = "BN", out_features: Sequence[str] = ("res4",)) -> ResNet:
    """Build the ResNet for images of 32 x 32 pixels: stages res2, res3 and res4 of strides 1, 2 and 4.

    Args:
        depth: 6 n + 2: 8, 20, 32, 56, 110...
        width: factor of the paper's 16, 32 and 64 channels; > 0. "ResNet-32x4" has 4. The stem keeps 32 channels
            where the factor is above 1, as in the networks of that name, and 16 otherwise.
        norm: "BN", "SyncBN"...
        out_features: of "stem", "res2".."res4".

    Raises:
        UserError: the depth is not 6 n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"the depth of a cifar_resnet is {depth!r}; give 6 n + 2: 8, 20, 32, 56, 110...")
    blocks = (depth - 2) // 6
    channels = 32 if width > 1 else 16
    stem, stages = CifarStem(channels, norm), []
    for i in range(3):
        out_channels = 16 * width * 2**i
        strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=strides,
                in_channels=channels,
                out_channels=out_channels,
                norm=norm,
            )
        )
        channels = out_channels
    return ResNet(stem, stages, out_features=list(out_features))


def mobilenet_v1(**options: Any) -> MobileNetV1:
    """Build mgd_det's MobileNetV1 with ReLU after every convolution; it takes the same arguments."""
    network = MobileNetV1(**options)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                module.add_module(name, nn.ReLU(inplace=True))
    return network


class DepthwiseMobileNetV2(StagedBackbone):
    """MobileNetV2 as the authors of MGD distil it (kaiyuyue/mgd, cls/models/mobilenetv2.py), without its classifier.

    Two things differ from Sandler et al. (CVPR 2018, Table 2). The blocks of 64 channels keep the size of the map, and
    the first block of 96 channels halves it. And a position reads the depthwise convolution of a block, behind its
    batch norm and before its ReLU6. The weights keep torchvision's names, so that its weights load.

    ======  =======  ========  ================================
    stage   layers   stride    position, at ``width_mult`` 1.0
    ======  =======  ========  ================================
    stem    0..1     2
    res2    2..3     4
    res3    4..10    8         "res3.depthwise": 192, block 7
    res4    11..13   16        "res4.depthwise": 384, block 11
    res5    14..17   32        "res5.depthwise": 960, block 17
    ======  =======  ========  ================================

    The authors name a fourth position, 144 channels in block 4, and do not use it: its map has stride 8.
    """

    config_key = "MODEL.MOBILENETS"
    _POSITIONS = {"res3": 7, "res4": 11, "res5": 17}

    def __init__(
        self,
        *,
        norm: Norm = "BN",
        width_mult: float = 1.0,
        out_features: Sequence[str] = ("res5",),
        freeze_at: int = 0,
    ) -> None:
        """
        Args:
            norm: see :class:`StagedBackbone`.
            width_mult: factor of every layer's channels, > 0; results are rounded to multiples of 8.
            out_features: see :class:`StagedBackbone`.
            freeze_at: see :class:`StagedBackbone`.

        Raises:
            UserError: a value that is not listed above.
        """
        if not width_mult > 0:
            raise UserError(f"MODEL.MOBILENETS.WIDTH_MULT is {width_mult!r}; give a number > 0")
        # Expansion, channels, blocks, stride of the first block.
        blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 1], [6, 96, 3, 2], [6, 160, 3, 2]]
        blocks.append([6, 320, 1, 1])
        features = torchvision.models.MobileNetV2(
            num_classes=1, width_mult=width_mult, inverted_residual_setting=blocks
        ).features
        stages: List[Stage] = []
        ranges = {"stem": (0, 2), "res2": (2, 4), "res3": (4, 11), "res4": (11, 14), "res5": (14, 18)}
        for i, (name, (start, stop)) in enumerate(ranges.items()):
            channels = [m for m in features[stop - 1].modules() if isinstance(m, nn.Conv2d)][-1].out_channels
            stages.append(Stage(name, tuple(f"features.{j}" for j in range(start, stop)), channels, 2 ** (i + 1)))
        network = nn.ModuleDict({"features": features})
        super().__init__(network, stages, norm=norm, out_features=out_features, freeze_at=freeze_at)

    def distillation_features(self) -> Dict[str, FeatureSpec]:
        """Return the positions of the table above, of the stages that this backbone has."""
        built = [stage.name for stage in self.built_stages]
        paths = {stage: f"features.{block}.conv.1" for stage, block in self._POSITIONS.items() if stage in built}
        return {f"{stage}.depthwise": FeatureSpec(path, True, norm=f"{path}.1") for stage, path in paths.items()}
