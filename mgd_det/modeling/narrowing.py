"""A teacher's FPN and heads made as narrow as the student's: which channels stay, and their tensors."""

import zlib
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional

from torch import Tensor, nn

from mgd_det.errors import ArgumentError, check_choice, check_count
from mgd_det.matching import closest_separable
from mgd_det.matching.channel_selection import CRITERIA, Consumer, fold_dropped, relative_error, select_channels
from mgd_det.modeling.channel_layout import ChannelLayout, channel_layout, input_dim
from mgd_det.modeling.channel_statistics import ChannelStatistics, measure_channels
from mgd_det.modeling.factorising import SeparableFactors, factorised_layers, fit_separable

# A criterion of this name keeps the teacher as it is: only tensors of equal shape fit.
NO_CRITERION = "none"


@dataclass(frozen=True)
class NarrowingOptions:
    """How channels are chosen where the student is narrower; see MODEL.MGD.INHERIT_CHANNELS.

    Attributes:
        criterion: of :data:`CRITERIA`, or "none" to choose nothing.
        num_batches: batches to measure on; > 0.
        compensate: fold the dropped channels into the weights that read them, adjust group norms, and fit separable
            convolutions to the outputs of the teacher's dense ones.

    Raises:
        ArgumentError: an option has a wrong value.
    """

    criterion: str = "reconstruction"
    num_batches: int = 20
    compensate: bool = True

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, (*CRITERIA, NO_CRITERION))
        check_count("num_batches", self.num_batches)
        if not isinstance(self.compensate, bool):
            raise ArgumentError("compensate", f"is {self.compensate!r}; give True or False")

    @property
    def is_measured(self) -> bool:
        """Whether the teacher has to run on batches."""
        return self.compensate or self.criterion not in ("weight", "random")


@dataclass(frozen=True)
class Narrowed:
    """A teacher's tensors with the channels that a narrower student has.

    Attributes:
        channels: by set of channels (:class:`ChannelLayout`), those of the teacher that stay, (K,) long, ascending.
        widths: by set, the channels that the teacher has.
        errors: by set, the relative squared error of what the next layers compute (:func:`relative_error`), or None.
        tensors: the tensors that changed, by name.
        factors: by name of a separable convolution of the student's, its weights, fitted to the teacher's dense one.
    """

    channels: Dict[str, Tensor] = field(default_factory=dict)
    widths: Dict[str, int] = field(default_factory=dict)
    errors: Dict[str, Optional[float]] = field(default_factory=dict)
    tensors: Dict[str, Tensor] = field(default_factory=dict)
    factors: Dict[str, SeparableFactors] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for name, kept in self.channels.items():
            error = self.errors[name]
            shown = "" if error is None else f", error of the layers that read them {100 * error:.1f} %"
            lines.append(f"{name}: {len(kept)} of {self.widths[name]} channels{shown}")
        return "\n".join(lines)


def narrower_sets(teacher: ChannelLayout, student: ChannelLayout) -> Dict[str, int]:
    """Return by set of channels the student's width, where the teacher has more."""
    widths = {name: width for name, width in student.widths.items() if name in teacher.widths}
    return {name: width for name, width in widths.items() if width < teacher.widths[name]}


def narrow(
    teacher: nn.Module,
    student: nn.Module,
    teacher_state: Mapping[str, Tensor],
    options: NarrowingOptions = NarrowingOptions(),  # noqa: B008  (immutable)
    batches: Iterable[Any] = (),
) -> Narrowed:
    """Choose the teacher's channels for a narrower student, slice its tensors, and fit separable convolutions.

    A set of channels is chosen once for all layers that make or read it: the outputs of the FPN for every level and
    every head, those of a hidden layer for the next one.

    Args:
        teacher: a detector with an FPN.
        student: one with the same layers, as far as it is to inherit them.
        teacher_state: the tensors of ``teacher`` to slice, by name. Layers that they lack take no part in the choice.
        options: how to choose.
        batches: inputs of the teacher, as many as to measure on; not read if the options need no measurement.

    Returns:
        The chosen channels, and the tensors of ``teacher_state`` that they change.

    Raises:
        UserError: the options need a measurement, and there is no batch.
    """
    layout, own = channel_layout(teacher), channel_layout(student)
    widths = narrower_sets(layout, own)
    readers = {name: channels for name, channels in layout.inputs.items() if f"{name}.weight" in teacher_state}
    factorised = [
        name
        for name in (factorised_layers(student, teacher_state) if options.compensate else [])
        if getattr(teacher.get_submodule(name), "groups", 0) == 1
    ]
    statistics = ChannelStatistics()
    if factorised or (options.is_measured and widths):
        statistics = measure_channels(
            teacher,
            batches,
            {name: layout.widths[channels] for name, channels in readers.items() if channels in widths},
            [name for name, channels in layout.groups.items() if channels in widths],
            {name: closest_separable(teacher_state[f"{name}.weight"])[0] for name in factorised},
        )
    narrowed = Narrowed(widths={name: layout.widths[name] for name in widths})
    for name, width in widths.items():
        consumers = [
            Consumer(_weight(teacher, reader, layout.widths[name]), statistics.moments.get(reader))
            for reader, channels in readers.items()
            if channels == name
        ]
        if not consumers:
            continue  # nothing reads them, so no tensor would tell which to keep
        blocks = _blocks(teacher, student, layout, name, width)
        seed = zlib.crc32(name.encode())
        kept = select_channels(consumers, width, options.criterion, blocks=blocks, seed=seed)
        narrowed.channels[name] = kept
        narrowed.errors[name] = relative_error(consumers, kept, options.compensate)
    slicer = _Slicer(teacher, layout, own, narrowed.channels, statistics if options.compensate else ChannelStatistics())
    for name, value in teacher_state.items():
        sliced = slicer.sliced(name, value)
        if sliced is not value:
            narrowed.tensors[name] = sliced
    if options.compensate:
        narrowed.tensors.update(_adjusted_group_norms(teacher, student, layout, narrowed, statistics))
    for name, moments in statistics.separable.items():
        made, read = (narrowed.channels.get(channels or "") for channels in layout.axes.get(f"{name}.weight", ("", "")))
        factors = fit_separable(teacher_state[f"{name}.weight"], moments, made, read)
        if factors.pointwise.shape == student.get_submodule(name).get_parameter("weight").shape:
            narrowed.factors[name] = factors
    return narrowed


class _Slicer:
    def __init__(
        self,
        teacher: nn.Module,
        layout: ChannelLayout,
        student: ChannelLayout,
        channels: Mapping[str, Tensor],
        statistics: ChannelStatistics,
    ) -> None:
        self._teacher, self._layout, self._student = teacher, layout, student
        self._channels, self._statistics = channels, statistics

    def sliced(self, name: str, value: Tensor) -> Tensor:
        """Return the kept part of a tensor; the tensor itself if it loses nothing or the student's is another."""
        axes = self._layout.axes.get(name, ())
        if axes != self._student.axes.get(name) or not any(channels in self._channels for channels in axes):
            return value
        module, _, key = name.rpartition(".")
        read = self._layout.inputs.get(module) if key == "weight" else None
        for dim, channels in enumerate(axes):
            if channels is None or channels not in self._channels:
                continue
            kept, width = self._channels[channels], self._layout.widths[channels]
            # (..., channels, values of a channel, ...)
            parts = value.unflatten(dim, (width, -1))
            moment = self._statistics.moments.get(module)
            if channels == read and dim == input_dim(self._teacher.get_submodule(module)) and moment is not None:
                parts = _folded(parts, dim, moment, kept)
            else:
                parts = parts.index_select(dim, kept)
            value = parts.flatten(dim, dim + 1)
        return value.contiguous()


def _folded(parts: Tensor, dim: int, moment: Tensor, kept: Tensor) -> Tensor:
    moved = parts.movedim(dim, 1)
    folded = fold_dropped(moved.flatten(2), moment, kept)
    return folded.unflatten(2, moved.shape[2:]).movedim(1, dim)


def _weight(teacher: nn.Module, name: str, width: int) -> Tensor:
    """Return a layer's weight as (outputs, channels read, positions) on the CPU."""
    layer = teacher.get_submodule(name)
    dim, weight = input_dim(layer), layer.get_parameter("weight").detach().cpu()
    return weight.unflatten(dim, (width, -1)).movedim(dim, 1).flatten(2)


def _group_norms(teacher: nn.Module, student: nn.Module, layout: ChannelLayout) -> Dict[str, List[nn.GroupNorm]]:
    """Return the group norms that both have, by name: the teacher's and the student's."""
    modules = dict(student.named_modules())
    pairs = {name: [teacher.get_submodule(name), modules.get(name)] for name in layout.groups}
    return {name: pair for name, pair in pairs.items() if isinstance(pair[1], nn.GroupNorm)}  # type: ignore[misc]


def _blocks(teacher: nn.Module, student: nn.Module, layout: ChannelLayout, channels: str, width: int) -> int:
    """Return the groups of which equally many channels must stay, so that each group stays one; 1 for no groups."""
    pairs = [pair for name, pair in _group_norms(teacher, student, layout).items() if layout.groups[name] == channels]
    numbers = {norm.num_groups for pair in pairs for norm in pair}
    blocks = numbers.pop() if len(numbers) == 1 else 1
    return blocks if width % blocks == 0 and layout.widths[channels] % blocks == 0 else 1


def _adjusted_group_norms(
    teacher: nn.Module, student: nn.Module, layout: ChannelLayout, narrowed: Narrowed, statistics: ChannelStatistics
) -> Dict[str, Tensor]:
    """Return weights and biases of group norms, for the statistics of the channels that are left.

    The student's groups have fewer channels, so their mean and deviation are others than those of the teacher's. Weight
    and bias are those with which the student's norm comes closest to the teacher's, by least squares over all pixels of
    the measured maps, each map counting as much as any other.
    """
    adjusted = {}
    for name, (theirs, own) in _group_norms(teacher, student, layout).items():
        kept = narrowed.channels.get(layout.groups[name])
        if kept is None or len(kept) != own.num_channels or name not in statistics.maps:
            continue
        if not (theirs.affine and own.affine):
            continue
        means, squares = statistics.maps[name]
        mean, deviation = (part[:, kept] for part in _group_statistics(means, squares, theirs))
        means, squares = means[:, kept], squares[:, kept]
        new_mean, new_deviation = _group_statistics(means, squares, own)
        # With x the input, v = (x - mean) / deviation is to be a u + b of u = (x - new_mean) / new_deviation.
        u, v = ((means - new_mean) / new_deviation).mean(dim=0), ((means - mean) / deviation).mean(dim=0)
        uu = ((squares - 2 * new_mean * means + new_mean.square()) / new_deviation.square()).mean(dim=0)
        uv = ((squares - (mean + new_mean) * means + mean * new_mean) / (deviation * new_deviation)).mean(dim=0)
        variance = uu - u.square()
        slope = ((uv - u * v) / variance).where(variance > 1e-9, u.new_ones(()))
        weight, bias = theirs.weight.detach().cpu()[kept], theirs.bias.detach().cpu()[kept]
        adjusted[f"{name}.weight"] = (weight * slope).to(weight)
        adjusted[f"{name}.bias"] = (bias + weight * (v - slope * u)).to(bias)
    return adjusted


def _group_statistics(means: Tensor, squares: Tensor, norm: nn.GroupNorm) -> List[Tensor]:
    """Return mean and deviation of each channel's group in each map, (N, C) each."""
    size = norm.num_channels // norm.num_groups
    mean, square = (part.unflatten(1, (-1, size)).mean(dim=2) for part in (means, squares))
    deviation = ((square - mean.square()).clamp(min=0) + norm.eps).sqrt()
    return [part.repeat_interleave(size, dim=1) for part in (mean, deviation)]
