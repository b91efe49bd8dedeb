"""A teacher's dense convolutions as separable ones of a student, with fitted outputs.

Shape shorthand in this module: C input channels, O output channels, k the side of a kernel; K of each that are kept.
"""

from dataclasses import dataclass
from typing import List, Mapping, Optional

import torch
from torch import Tensor, nn

from mgd_det.matching import closest_separable
from mgd_det.modeling.channel_statistics import SeparableMoments
from mgd_det.modeling.light.separable_conv import SeparableConv2d

# Of the mean square of the depthwise outputs: directions with less of it keep their weights.
_RIDGE = 1e-4


@dataclass(frozen=True)
class SeparableFactors:
    """The two weights of a separable convolution.

    Attributes:
        depthwise: (K_in, 1, k, k).
        pointwise: (K_out, K_in, 1, 1).
        error: the squared error of the outputs on the measured batches, relative to their squares.
    """

    depthwise: Tensor
    pointwise: Tensor
    error: float


def factorised_layers(student: nn.Module, teacher_state: Mapping[str, Tensor]) -> List[str]:
    """Return the names of a student's separable convolutions that are dense, with kernels as large, in the teacher.

    Args:
        student: a detector.
        teacher_state: tensors of the teacher's detector by name.
    """
    names = []
    for name, module in student.named_modules():
        weight = teacher_state.get(f"{name}.weight")
        if not isinstance(module, SeparableConv2d) or weight is None or f"{name}.depthwise.weight" in teacher_state:
            continue
        if weight.shape[2:] == module.depthwise.weight.shape[2:]:
            names.append(name)
    return names


def fit_separable(
    weight: Tensor, moments: SeparableMoments, made: Optional[Tensor] = None, read: Optional[Tensor] = None
) -> SeparableFactors:
    """Split a dense convolution, and fit the pointwise weights to its outputs by least squares.

    The depthwise kernels are those of :func:`~mgd_det.matching.closest_separable`. With the pointwise weights, outputs
    come closest to those of the dense convolution on the measured batches. Where input channels are left out, the
    others take over what they can.

    Args:
        weight: (O, C, k, k).
        moments: measured with the depthwise kernels of the whole weight.
        made: output channels that are kept, (K_out,) long; default: all.
        read: input channels that are kept, (K_in,) long; default: all.
    """
    depthwise, pointwise = closest_separable(weight.cpu())
    made = torch.arange(len(weight)) if made is None else made
    read = torch.arange(weight.shape[1]) if read is None else read
    start = pointwise[made][:, read, 0, 0].double()
    inputs, cross = moments.inputs[read][:, read], moments.cross[made][:, read]
    ridge = _RIDGE * inputs.diagonal().mean() + torch.finfo(inputs.dtype).tiny
    regular = inputs + ridge * torch.eye(len(read), dtype=inputs.dtype)
    fitted = start + torch.linalg.solve(regular, (cross - start @ inputs).T).T
    # E |y - P z|^2 = E |y|^2 - 2 <P, E y z^T> + <P, P E z z^T>
    energy = moments.outputs[made].sum()
    error = energy - 2 * (fitted * cross).sum() + (fitted * (fitted @ inputs)).sum()
    relative = (error / energy).clamp(min=0).item() if energy > 0 else 0.0
    return SeparableFactors(depthwise[read], fitted[:, :, None, None].to(pointwise), relative)
