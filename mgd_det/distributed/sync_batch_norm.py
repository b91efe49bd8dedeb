"""Synchronised batch norm on the CPU; torch's own runs only on GPUs."""

import torch
from fvcore.nn.distributed import differentiable_all_reduce
from torch import nn


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm for inputs (B, C, H, W) on the CPU, over the ranks of the default process group.

    It computes the same as nn.BatchNorm2d over the values of all ranks together, including the running statistics, even
    if B or the map's size differs between the ranks. Detectron2's NaiveSyncBatchNorm gives each rank or image the same
    weight and keeps the biased variance. This is not a subclass of nn.SyncBatchNorm, because DistributedDataParallel
    rejects that on the CPU.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or torch.distributed.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        channels, dims, shape = input.shape[1], (0, 2, 3), (1, -1, 1, 1)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = x.new_full((1,), x.numel() // channels)
        summed = differentiable_all_reduce(torch.cat([x.sum(dims), count]))
        total = summed[-1].detach()
        if total < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        mean = summed[:-1] / total
        centred = x - mean.view(shape)
        # A second pass, as E[x^2] - E[x]^2 cancels.
        variance = differentiable_all_reduce(centred.square().sum(dims)) / total
        self._update_running_statistics(mean.detach(), variance.detach() * total / (total - 1))
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return  # track_running_stats=False
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def use_cpu_sync_batch_norm(model: nn.Module) -> None:
    """Make every nn.SyncBatchNorm of a model synchronise on the CPU; nothing else in the model changes."""
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            # Not a new layer, because hooks and other modules refer to this one.
            module.__class__ = CPUSyncBatchNorm  # type: ignore[assignment]
