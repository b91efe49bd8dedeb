"""ShuffleNetV2 as a Detectron2 backbone, on torchvision's own blocks."""

from typing import Dict, Sequence

import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import configurable
from torch import nn

from mgd_det.distillation.features import FeatureSpec
from mgd_det.errors import UserError
from mgd_det.modeling.backbone.norms import Norm
from mgd_det.modeling.backbone.staged_backbone import STAGE_NAMES, Stage, StagedBackbone, set_input_channels

_NETWORKS = {
    0.5: torchvision.models.shufflenet_v2_x0_5,
    1.0: torchvision.models.shufflenet_v2_x1_0,
    1.5: torchvision.models.shufflenet_v2_x1_5,
    2.0: torchvision.models.shufflenet_v2_x2_0,
}


class ShuffleNetV2(StagedBackbone):
    """ShuffleNetV2 (Ma et al., ECCV 2018, Table 5) without its classifier.

    The layers are torchvision's and sit under the same names, so a state dict of
    ``torchvision.models.shufflenet_v2_x1_0`` loads as it is, its ``conv5`` and ``fc`` aside.

    ======  =========  ======  =======================================
    stage   layers     stride  channels at ``width_mult`` 0.5/1/1.5/2
    ======  =========  ======  =======================================
    stem    conv1      2       24
    res2    maxpool    4       24
    res3    stage2     8       48 / 116 / 176 / 244
    res4    stage3     16      96 / 232 / 352 / 488
    res5    stage4     32      192 / 464 / 704 / 976
    ======  =========  ======  =======================================

    Here the last ReLU of each stage runs after everything else, and not in place, so that the map before it can be
    read. That changes no value. A block returns its channels x1, which an earlier ReLU has rectified, and its
    rectified branch x2, shuffled. A second ReLU does not change x1, and a shuffle only moves channels, so
    shuffle(cat(x1, relu(x2))) = relu(shuffle(cat(x1, x2))). A ReLU before the stem's max-pooling gives the same as one
    after it, because it is monotonic.
    """

    config_key = "MODEL.SHUFFLENETS"

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
            width_mult: 0.5, 1.0, 1.5 or 2.0, the networks of the paper.
            norm: see :class:`StagedBackbone`.
            out_features: see :class:`StagedBackbone`.
            freeze_at: see :class:`StagedBackbone`. res2 has no parameters: 2 freezes what 1 does.
            in_channels: channels of the input image, > 0.

        Raises:
            UserError: a value that is not listed above.
        """
        if width_mult not in _NETWORKS:
            raise UserError(
                f"MODEL.SHUFFLENETS.WIDTH_MULT is {width_mult!r}; use one of {', '.join(map(str, _NETWORKS))}"
            )
        # The classifier is dropped, so its size does not matter.
        network = _NETWORKS[width_mult](num_classes=1)
        set_input_channels(network, in_channels)
        network.relu = nn.ReLU()
        network.conv1[2] = nn.Identity()
        modules, channels = [("conv1",), ("maxpool", "relu")], [network.conv1[0].out_channels] * 2
        for name in ("stage2", "stage3", "stage4"):
            branch = network.get_submodule(name)[-1].branch2
            branch[7] = nn.Identity()
            modules.append((name, "relu"))
            channels.append(2 * branch[5].out_channels)
        stages = [Stage(*x, stride=2 ** (i + 1)) for i, x in enumerate(zip(STAGE_NAMES, modules, channels))]
        super().__init__(network, stages, norm=norm, out_features=out_features, freeze_at=freeze_at)

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Run the stages, see :meth:`StagedBackbone.forward`."""
        outputs = super().forward(x)
        if "stem" in outputs:  # its ReLU runs after the max-pooling, for res2
            outputs["stem"] = F.relu(outputs["stem"])
        return outputs

    def distillation_features(self) -> Dict[str, FeatureSpec]:
        """Return the feature "resN" of each stage: its output before its ReLU. Half of its channels are rectified.

        No norm layer describes a feature: only x2 (see above) comes out of the stage's last one, and res2 is a maximum
        over places.

        Returns:
            :class:`FeatureSpec` by name, shallow to deep, of the stages that this backbone has.
        """
        return {stage.name: FeatureSpec(stage.modules[0], before_activation=False) for stage in self.built_stages[1:]}
