"""Detectron2's FPN, heads and dense detectors with separable convolutions, by names in its registries.

A yaml config chooses them by name, in the key that names the plain ones:

- ``MODEL.META_ARCHITECTURE``: :class:`SeparableRetinaNet`, :class:`SeparableFCOS`;
- ``MODEL.RPN.HEAD_NAME``: :class:`SeparableRPNHead`;
- ``MODEL.ROI_BOX_HEAD.NAME``: :class:`SeparableConvFCHead`;
- ``MODEL.ROI_MASK_HEAD.NAME``: :class:`SeparableMaskHead`.

A LazyConfig gives a part one of these classes as its ``_target_``. Every other key or argument is the plain part's:
``NUM_CONVS`` of a head, for instance, and ``MODEL.FPN.OUT_CHANNELS``.
"""

from typing import Any, ClassVar, Dict

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead

from mgd_det.errors import UserError
from mgd_det.modeling.light.separable_conv import make_separable
from mgd_det.modeling.meta_arch import FCOS


class _Separable:
    """Builds the class that it precedes, then makes its convolutions separable."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        make_separable(self)  # type: ignore[type-var]


class SeparableFPN(_Separable, FPN):
    """Detectron2's FPN with separable convolutions at its outputs and, in RetinaNet and FCOS, of p6 and p7."""


class SeparableRetinaNetHead(_Separable, RetinaNetHead):
    """Detectron2's RetinaNet head; the layers that predict classes and boxes are separable too."""


class SeparableFCOSHead(_Separable, FCOSHead):
    """Detectron2's FCOS head; the layers that predict classes, boxes and centre-ness are separable too."""


@META_ARCH_REGISTRY.register()
class SeparableRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with :class:`SeparableRetinaNetHead`, for yaml configs."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        """Read what RetinaNet reads."""
        return _with_separable_head(super().from_config(cfg))


@META_ARCH_REGISTRY.register()
class SeparableFCOS(FCOS):
    """FCOS with :class:`SeparableFCOSHead`, for yaml configs."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        """Read what FCOS reads."""
        return _with_separable_head(super().from_config(cfg))


def _with_separable_head(arguments: Dict[str, Any]) -> Dict[str, Any]:
    make_separable(arguments["head"])
    return arguments


@RPN_HEAD_REGISTRY.register()
class SeparableRPNHead(_Separable, StandardRPNHead):
    """Detectron2's RPN head with separable convolutions, ``MODEL.RPN.CONV_DIMS``. The predictors are 1 x 1."""


class _SeparableRoIHead(_Separable):
    """A head of regions, which must have a convolution."""

    _node: ClassVar[str]  # of MODEL

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> Dict[str, Any]:
        """Read what the plain head reads.

        Raises:
            UserError: it has no convolution.
        """
        node = cfg.MODEL[cls._node]
        if node.NUM_CONV < 1:
            raise UserError(
                f"MODEL.{cls._node}.NAME is {node.NAME!r}, and MODEL.{cls._node}.NUM_CONV is {node.NUM_CONV}: a head "
                "without a convolution has none to make separable. Give it one or more, or the name of a plain head"
            )
        arguments: Dict[str, Any] = super().from_config(cfg, input_shape)  # type: ignore[misc]
        return arguments


@ROI_BOX_HEAD_REGISTRY.register()
class SeparableConvFCHead(_SeparableRoIHead, FastRCNNConvFCHead):
    """Detectron2's box head with ``MODEL.ROI_BOX_HEAD.NUM_CONV`` separable convolutions, at least one."""

    _node = "ROI_BOX_HEAD"


@ROI_MASK_HEAD_REGISTRY.register()
class SeparableMaskHead(_SeparableRoIHead, MaskRCNNConvUpsampleHead):
    """Detectron2's mask head with ``MODEL.ROI_MASK_HEAD.NUM_CONV`` separable convolutions, at least one."""

    _node = "ROI_MASK_HEAD"
