"""FCOS's head with an embedding and margins for every proposal."""

import math
from typing import Any, List, Tuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead
from torch import Tensor, nn
from torch.nn import functional as F

from mgd_det.errors import ArgumentError, check_positive


class EmbedMaskHead(FCOSHead):
    """The proposal head of EmbedMask (arXiv:1912.01954): two more outputs of FCOS's box tower.

    Attributes:
        dim: D, the dimensions of an embedding.
    """

    def __init__(
        self,
        *,
        input_shape: List[ShapeSpec],
        conv_dims: List[int],
        dim: int = 32,
        prior_distance: float = 2.0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: of the levels, with channels and stride.
            conv_dims: channels of the convolutions of the two towers.
            dim: of the embeddings; > 2.
            prior_distance: of a pixel to a proposal at which the probability is 0.5 with the initial margins. In the
                first two dimensions it grows with the level's stride, as the objects do.
            kwargs: of :class:`detectron2.modeling.meta_arch.fcos.FCOSHead`: num_classes, norm, prior_prob.

        Raises:
            ArgumentError: a value cannot be used.
        """
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, **kwargs)
        if isinstance(dim, bool) or not isinstance(dim, int) or dim <= 2:
            raise ArgumentError("dim", f"is {dim!r}; give a whole number > 2")
        distance = check_positive("prior_distance", prior_distance)
        self.dim = dim
        strides = [shape.stride or 1 for shape in input_shape]
        self._margin_scales = [(strides[0] / stride) ** 2 for stride in strides]
        self.embedding = nn.Conv2d(conv_dims[-1], dim, kernel_size=3, padding=1)
        self.margin = nn.Conv2d(conv_dims[-1], dim, kernel_size=3, padding=1)
        for layer in (self.embedding, self.margin):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))
        # softplus(bias) is the margin with which exp(-margin * distance^2) is 0.5.
        margin = math.log(2) / distance**2
        nn.init.constant_(self.margin.get_parameter("bias"), math.log(math.expm1(margin)))

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], ...]:
        """Return logits, deltas, centre-ness, embeddings and margins of each level.

        Args:
            features: (B, C, H, W) of each level.

        Returns:
            Lists of (B, classes, H, W), (B, 4, H, W), (B, 1, H, W), (B, D, H, W) and (B, D, H, W). Margins are > 0.
        """
        outputs: Tuple[List[Tensor], ...] = ([], [], [], [], [])
        for feature, scale in zip(features, self._margin_scales, strict=True):
            of_boxes = self.bbox_subnet(feature)
            # The margins learn from the box tower, but do not change it, as the authors train them.
            margins = F.softplus(self.margin(of_boxes.detach()).float())
            margins = torch.cat([margins[:, :2] * scale, margins[:, 2:]], dim=1)
            predictions = (
                self.cls_score(self.cls_subnet(feature)),
                self.bbox_pred(of_boxes),
                self.ctrness(of_boxes),
                self.embedding(of_boxes),
                margins,
            )
            for output, prediction in zip(outputs, predictions):
                output.append(prediction)
        return outputs
