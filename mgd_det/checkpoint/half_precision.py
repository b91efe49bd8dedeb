"""Weights in half the space: a ``.safetensors`` file in float16."""

from typing import Dict, Mapping

import torch
from torch import Tensor

from mgd_det.errors import UserError
from mgd_det.files.atomic_files import write_atomically


def write_half_precision(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors of a model, those of floats in float16.

    :class:`mgd_det.checkpoint.WeightsCheckpointer` loads the file into a model of any precision. A weight changes by at
    most 1 / 2048 of its value, or by 3e-8 if it is that small.

    Args:
        path: a ``.safetensors`` file.
        tensors: by name, such as entry "model" of a checkpoint.
        metadata: texts that the file keeps beside the tensors, as ``safetensors.safe_open(...).metadata()`` gives them.

    Raises:
        UserError: a value is beyond 65504, the largest of float16.
    """
    from safetensors.torch import save

    halves: Dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        half = tensor.detach().cpu()
        if half.is_floating_point():
            half = half.to(torch.float16)
            if not bool(half.isfinite().all()):
                raise UserError(f"{path}: {name} has values that float16 cannot hold; keep the weights in float32")
        halves[name] = half.contiguous()
    data = save(halves, dict(metadata))
    write_atomically(path, lambda file: file.write(data))
