"""A teacher's channels on some batches: second moments of what layers read, and statistics of group norms."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Mapping, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from mgd_det.errors import UserError
from mgd_det.modeling.channel_layout import is_depthwise
from mgd_det.modeling.modes import evaluating

# A box head reads thousands of regions: their copies in float64 would fill the memory.
_VALUES_AT_ONCE = 2**24


@dataclass
class ChannelStatistics:
    """Measured by :func:`measure_channels`. Each call of a layer (a level of the FPN) counts as much as any other.

    Attributes:
        moments: by name of a layer, (C, C) float64: the mean of x x^T over the pixels x of its input.
        maps: by name of a group norm, the mean and the mean square of each channel of each map, two of (N, C) float64.
        separable: by name of a dense convolution, what :class:`SeparableMoments` describes.
    """

    moments: Dict[str, Tensor] = field(default_factory=dict)
    maps: Dict[str, Tuple[Tensor, Tensor]] = field(default_factory=dict)
    separable: Dict[str, "SeparableMoments"] = field(default_factory=dict)

    def not_finite(self) -> List[str]:
        """Return the names of the layers whose statistics have an infinity or NaN."""
        parts: List[Tuple[str, Any]] = [(name, [moment]) for name, moment in self.moments.items()]
        parts += [*self.maps.items(), *((name, vars(moments).values()) for name, moments in self.separable.items())]
        return [name for name, tensors in parts if not all(tensor.isfinite().all() for tensor in tensors)]


@dataclass
class SeparableMoments:
    """Means over the pixels of the outputs y of a dense convolution, without bias, and z of a depthwise one beside it.

    Attributes:
        inputs: of z z^T, (C, C) float64.
        cross: of y z^T, (O, C) float64.
        outputs: of the squares of y, (O,) float64.
    """

    inputs: Tensor
    cross: Tensor
    outputs: Tensor


@torch.no_grad()
def measure_channels(
    detector: nn.Module,
    batches: Iterable[Any],
    inputs: Mapping[str, int],
    group_norms: Iterable[str] = (),
    depthwise: Mapping[str, Tensor] = {},  # noqa: B006  (not changed)
) -> ChannelStatistics:
    """Run a detector in eval mode, without gradient; its modes are restored.

    Args:
        detector: a detector, with its heads.
        batches: its inputs.
        inputs: by name of a convolution or linear layer, the channels of its input; a linear layer may read several
            values of each, as of a map that is flattened channel by channel.
        group_norms: names of group norms.
        depthwise: by name of a dense convolution, the weight (C, 1, k, k) of a depthwise one of the same input, stride,
            padding and dilation.

    Returns:
        What was measured. A layer that no batch reached, such as a mask head without detections, is missing.

    Raises:
        UserError: there is no batch, or what a layer reads is not finite.
    """
    sums: Dict[str, Tensor] = {}
    calls: Dict[str, int] = defaultdict(int)
    maps: Dict[str, List[Tuple[Tensor, Tensor]]] = defaultdict(list)

    def add_moment(name: str) -> Any:
        def hook(x: Tensor) -> None:
            if x.numel() == 0:
                return
            values = x.reshape(len(x), inputs[name], -1)  # a flattened map has its pixels behind its channels
            moment = x.new_zeros(inputs[name], inputs[name], dtype=torch.float64)
            for part in values.split(max(_VALUES_AT_ONCE // values[0].numel(), 1)):
                pixels = part.transpose(1, 2).flatten(0, 1).double()
                moment += pixels.T @ pixels
            moment /= values.numel() / inputs[name]
            sums[name] = sums[name] + moment if name in sums else moment
            calls[name] += 1

        return hook

    def add_maps(name: str) -> Any:
        def hook(module: nn.Module, args: Tuple[Tensor, ...]) -> None:
            if args[0].numel() > 0:
                x = args[0].double().flatten(2)
                maps[name].append((x.mean(dim=2).cpu(), x.square().mean(dim=2).cpu()))

        return hook

    separable: Dict[str, SeparableMoments] = {}

    def add_separable(name: str) -> Any:
        def hook(layer: nn.Conv2d, args: Tuple[Tensor, ...]) -> None:
            if args[0].numel() > 0:
                calls[f"{name}.depthwise"] += 1
                found = _separable_moments(layer, args[0], depthwise[name])
                separable[name] = (
                    _mean(separable[name], found, calls[f"{name}.depthwise"]) if name in separable else found
                )

        return hook

    handles = [_on_input(detector.get_submodule(name), add_moment(name)) for name in inputs]
    handles += [detector.get_submodule(name).register_forward_pre_hook(add_maps(name)) for name in group_norms]
    handles += [detector.get_submodule(name).register_forward_pre_hook(add_separable(name)) for name in depthwise]
    try:
        with evaluating(detector):
            number = 0
            for number, batch in enumerate(batches, start=1):  # noqa: B007  (read behind the loop)
                detector(batch)
    finally:
        for handle in handles:
            handle.remove()
    if number == 0:
        # Without a moment, every criterion would choose by the weights alone, and nothing would be compensated.
        raise UserError(
            "there is no batch to measure the teacher's channels on (MODEL.MGD.INHERIT_CHANNELS): give a training set "
            "with images, or a CRITERION of 'weight' with COMPENSATE False, which measures nothing"
        )
    statistics = ChannelStatistics(
        moments={name: (total / calls[name]).cpu() for name, total in sums.items()},
        maps={
            name: (torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts])) for name, parts in maps.items()
        },
        separable=separable,
    )
    broken = statistics.not_finite()
    if broken:
        raise UserError(
            f"the teacher's channels cannot be chosen (MODEL.MGD.INHERIT_CHANNELS): what {broken[0]} reads is infinite "
            "or not a number. Give weights without such values (MODEL.MGD.TEACHER.WEIGHTS)"
        )
    return statistics


def _separable_moments(layer: nn.Conv2d, x: Tensor, depthwise: Tensor) -> SeparableMoments:
    geometry: Dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    inputs = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    cross = x.new_zeros(layer.out_channels, x.shape[1], dtype=torch.float64)
    outputs = x.new_zeros(layer.out_channels, dtype=torch.float64)
    pixels = 0
    for part in x.split(max(_VALUES_AT_ONCE // x[0].numel(), 1)):
        filtered = F.conv2d(part, depthwise.to(part), groups=x.shape[1], **geometry)
        dense = F.conv2d(part, layer.weight, **geometry)
        z, y = (maps.transpose(0, 1).flatten(1).double() for maps in (filtered, dense))
        inputs += z @ z.T
        cross += y @ z.T
        outputs += y.square().sum(dim=1)
        pixels += z.shape[1]
    return SeparableMoments(*(total.cpu() / pixels for total in (inputs, cross, outputs)))


def _mean(mean: SeparableMoments, new: SeparableMoments, count: int) -> SeparableMoments:
    keys = ("inputs", "cross", "outputs")
    return SeparableMoments(*(torch.lerp(getattr(mean, key), getattr(new, key), 1 / count) for key in keys))


def _on_input(layer: nn.Module, read: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``read`` with what a layer's weight multiplies: behind a depthwise convolution of its own, if it has one."""
    depthwise = next((child for child in layer.children() if is_depthwise(child)), None)
    if depthwise is not None:
        return depthwise.register_forward_hook(lambda module, args, output: read(output))
    return layer.register_forward_pre_hook(lambda module, args: read(args[0]))
