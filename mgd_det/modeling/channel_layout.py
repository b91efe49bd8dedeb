"""Which channels the tensors of an FPN and its heads share, so that some can be left out everywhere at once."""

import re
from dataclasses import dataclass, field
from typing import Dict, Iterable, Optional, Tuple

from detectron2.modeling.backbone import FPN
from torch import nn

# The channels of all levels that an FPN returns, which every head reads.
FPN_OUTPUTS = "fpn"
# Those of the sums of lateral and upper levels, which the FPN's output convolutions read.
FPN_SUMS = "fpn.sums"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)


@dataclass
class ChannelLayout:
    """The sets of channels of a detector's FPN and heads.

    A set is what two or more tensors have to agree on. It has the name of the layer that makes it, except
    :data:`FPN_OUTPUTS` and :data:`FPN_SUMS`, which many layers make.

    Attributes:
        widths: number of channels by set.
        axes: by tensor name, the set of each leading dimension, or None. Classes, boxes and the bottom-up network's
            features are in no set. A dimension may have several values a channel: a flattened map, channel by channel.
        inputs: by name of a convolution or linear layer, the set that it reads.
        groups: by name of a group norm, the set that it normalises.
    """

    widths: Dict[str, int] = field(default_factory=dict)
    axes: Dict[str, Tuple[Optional[str], ...]] = field(default_factory=dict)
    inputs: Dict[str, str] = field(default_factory=dict)
    groups: Dict[str, str] = field(default_factory=dict)

    def chain(self, prefix: str, module: nn.Module, channels: Optional[str], out: Optional[str] = "") -> Optional[str]:
        """Add layers that run one after the other, in the order in which they are registered.

        Args:
            prefix: name of ``module`` in the detector.
            module: a layer or a sequence of layers.
            channels: the set that the first layer reads; None for one that is not known.
            out: the set that the last layer makes; None if its outputs are in no set; "" for a set of its own.

        Returns:
            The set that the last layer makes.
        """
        layers = [(name, layer) for name, layer in module.named_modules(prefix=prefix)]
        mixing = [name for name, layer in layers if isinstance(layer, _WEIGHTED) and not is_depthwise(layer)]
        for name, layer in layers:
            if name in mixing:
                for child_name, child in layer.named_children():
                    if is_depthwise(child):  # it runs before the layer that owns it
                        self._add_by_channel(f"{name}.{child_name}", child, channels)
                channels = self._add_weighted(name, layer, channels, out if name == mixing[-1] and out != "" else name)
            elif not (is_depthwise(layer) and name.rpartition(".")[0] in mixing):
                self._add_by_channel(name, layer, channels)
        return channels

    def _add_weighted(self, name: str, layer: nn.Module, channels: Optional[str], out: Optional[str]) -> Optional[str]:
        sizes = layer.get_parameter("weight").shape[:2]
        is_transposed = input_dim(layer) == 0
        size_in, size_out = sizes if is_transposed else sizes[::-1]
        width = self.widths.get(channels, 0) if channels is not None else 0
        if getattr(layer, "groups", 1) != 1 or not width or size_in % width:
            channels = None
        elif size_in != width and not isinstance(layer, nn.Linear):
            channels = None
        if out is not None and self.widths.setdefault(out, size_out) != size_out:
            out = None
        self.axes[f"{name}.weight"] = (channels, out) if is_transposed else (out, channels)
        if layer.bias is not None:
            self.axes[f"{name}.bias"] = (out,)
        if channels is not None:
            self.inputs[name] = channels
        return out

    def _add_by_channel(self, name: str, layer: nn.Module, channels: Optional[str]) -> None:
        """Add a norm, an activation with parameters, or a depthwise convolution: the channels stay what they are."""
        if channels is None:
            return
        for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.ndim > 0 and len(tensor) == self.widths[channels]:
                self.axes[f"{name}.{key}"] = (channels, *[None] * (min(tensor.ndim, 2) - 1))
        if isinstance(layer, nn.GroupNorm):
            self.groups[name] = channels


def channel_layout(detector: nn.Module) -> ChannelLayout:
    """Return the sets of channels of Detectron2's detectors with an FPN: RetinaNet, FCOS and the R-CNNs.

    Layers of other detectors, and heads of other classes, are left out as far as they are not of this kind.

    Args:
        detector: the whole detector; its backbone may be distilled.
    """
    layout = ChannelLayout()
    backbone = getattr(detector, "backbone", None)
    if not isinstance(backbone, FPN):
        return layout
    layout.widths[FPN_OUTPUTS] = next(iter(backbone.output_shape().values())).channels
    for name, module in backbone.named_children():
        if re.fullmatch(r"fpn_lateral\d+", name):
            layout.chain(f"backbone.{name}", module, None, FPN_SUMS)
    for name, module in backbone.named_children():
        if re.fullmatch(r"fpn_output\d+", name):
            layout.chain(f"backbone.{name}", module, FPN_SUMS, FPN_OUTPUTS)
    top_block = backbone.top_block
    channels = FPN_OUTPUTS if str(getattr(top_block, "in_feature", "")).startswith("p") else None
    for name, module in top_block.named_children() if top_block is not None else ():
        channels = layout.chain(f"backbone.top_block.{name}", module, channels, FPN_OUTPUTS)
    _add_dense_head(layout, detector)
    _add_rpn(layout, detector)
    _add_roi_heads(layout, detector)
    return layout


def _add_dense_head(layout: ChannelLayout, detector: nn.Module) -> None:
    for tower, predictors in (("cls_subnet", ("cls_score",)), ("bbox_subnet", ("bbox_pred", "ctrness"))):
        _add_branch(layout, detector, f"head.{tower}", [f"head.{predictor}" for predictor in predictors])


def _add_rpn(layout: ChannelLayout, detector: nn.Module) -> None:
    head = "proposal_generator.rpn_head"
    _add_branch(layout, detector, f"{head}.conv", [f"{head}.objectness_logits", f"{head}.anchor_deltas"])


def _add_roi_heads(layout: ChannelLayout, detector: nn.Module) -> None:
    cascade = _submodule(detector, "roi_heads.box_head")
    stages = [f".{i}" for i in range(len(cascade))] if isinstance(cascade, nn.ModuleList) else [""]
    for stage in stages:
        predictor = f"roi_heads.box_predictor{stage}"
        _add_branch(
            layout, detector, f"roi_heads.box_head{stage}", [f"{predictor}.cls_score", f"{predictor}.bbox_pred"]
        )
    for name in ("roi_heads.mask_head", "roi_heads.keypoint_head"):
        head = _submodule(detector, name)
        if isinstance(head, nn.Sequential):
            layout.chain(name, head, FPN_OUTPUTS, out=None)


def _add_branch(layout: ChannelLayout, detector: nn.Module, trunk: str, predictors: Iterable[str]) -> None:
    """Add layers that read the FPN, and the predictors that read the last of them."""
    module = _submodule(detector, trunk)
    if module is None:
        return
    channels = layout.chain(trunk, module, FPN_OUTPUTS)
    for name in predictors:
        predictor = _submodule(detector, name)
        if predictor is not None:
            layout.chain(name, predictor, channels, out=None)


def _submodule(detector: nn.Module, name: str) -> Optional[nn.Module]:
    try:
        return detector.get_submodule(name)
    except AttributeError:
        return None


def input_dim(layer: nn.Module) -> int:
    """Return the dimension of a layer's weight that runs over its input channels."""
    return 0 if isinstance(layer, _TRANSPOSED) else 1


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether a layer is a convolution of each channel by itself."""
    return isinstance(layer, _CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1
