"""Batch norm with statistics over all processes, on CPUs and GPUs; torch's SyncBatchNorm supports GPUs only.

Gradients are those of the sum of the losses of all processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


def convert_global_batch_norm_(network: nn.Module) -> nn.Module:
    """Convert the batch norms of a network to `GlobalBatchNorm`; weights, running statistics and names stay."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = GlobalBatchNorm  # in place: parameters stay those that the optimiser holds
    return network


class GlobalBatchNorm(_BatchNorm):
    """A batch norm whose batch is spread over processes in training mode."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalise [B, C, ...]."""
        if not self.training:
            return functional.batch_norm(
                inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        count, mean, var = _global_statistics(inputs.detach())
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)  # unbiased, as torch's batch norm
        self.num_batches_tracked.add_(1)
        normalised: torch.Tensor = _Normalise.apply(inputs, self.weight, self.bias, count, mean, var, self.eps)
        return normalised


def _global_statistics(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the number of values per channel, their mean and their variance over all processes, each [C]."""
    mean, var = (value.double() for value in torch.batch_norm_update_stats(inputs, None, None, 0.0))
    count = torch.full_like(mean, inputs.numel() / inputs.shape[1])
    moments = count * torch.stack([torch.ones_like(mean), mean, var + mean**2])  # float64 against cancellation
    dist.all_reduce(moments)
    count, mean, square = moments[0], moments[1] / moments[0], moments[2] / moments[0]
    return count.float(), mean.float(), (square - mean**2).float()


class _Normalise(torch.autograd.Function):
    """Batch norm with given statistics, whose backward pass treats them as functions of the inputs of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        count: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight, count, mean, var)
        ctx.eps = eps
        return functional.batch_norm(inputs, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Ioffe and Szegedy 2015, section 3, with the sums taken over all processes."""
        inputs, weight, count, mean, var = ctx.saved_tensors
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, inputs, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([of_weight, of_bias])
        dist.all_reduce(sums)
        precision = torch.rsqrt(var + ctx.eps)
        slope = -weight * precision**2 * sums[0] / count
        offset = -weight * precision * sums[1] / count - slope * mean
        # slope * inputs + offset, by the fastest kernel for it in torch, above all for bfloat16
        zeros, ones = torch.zeros_like(slope), torch.ones_like(slope)
        through_statistics = functional.batch_norm(inputs, zeros, ones, slope, offset, eps=0.0)
        return direct + through_statistics, of_weight, of_bias, None, None, None, None
