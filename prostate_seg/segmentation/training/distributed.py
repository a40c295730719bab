"""Distributed training of one network: each process runs the network on its shard of every batch.

All processes draw the same batches, compute the loss of the whole batch and take the same step, so the result equals that of a
single process up to rounding. What depends on a clock or a file is broadcast from rank 0. Collectives and gradient averaging
are torch's: nccl between GPUs, gloo between CPUs. Batch norms have statistics over all processes, on CPUs and GPUs; torch's
SyncBatchNorm supports GPUs only.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from prostate_seg.common import torchrun
from prostate_seg.common.errors import InputError

TIMEOUT = timedelta(hours=1)
"""Timeout of a collective, for example while rank 0 packs the studies; a process that has ended is noticed at once."""

Value = TypeVar("Value")


class ProcessLostError(InputError):
    """Another process of the training has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroup:
    """Rank and world size of this process, with the collectives of training; every process calls them in the same order."""

    rank: int = 0
    world_size: int = 1

    def shard(self, num: int) -> slice:
        """Return the range of `num` items that belongs to this rank; shards differ in length by one at most."""
        return slice(num * self.rank // self.world_size, num * (self.rank + 1) // self.world_size)

    def broadcast_from_rank0(self, compute: Callable[[], Value]) -> Value:
        """Call `compute` on rank 0 alone and return its value on every rank."""
        if self.world_size == 1:
            return compute()
        box: list[Any] = [compute() if self.rank == 0 else None]
        dist.broadcast_object_list(box)
        return box[0]

    def all_gather(self, values: list[Value]) -> list[Value]:
        """Return the values of all ranks, in order of rank."""
        if self.world_size == 1:
            return values
        lists: list[Any] = [None] * self.world_size
        dist.all_gather_object(lists, values)
        return [value for one in lists for value in one]

    def all_gather_rows(self, local_rows: torch.Tensor, num: int) -> torch.Tensor:
        """Return all `num` rows, of which each rank has its shard; gradients flow to the local rows only."""
        if self.world_size == 1:
            return local_rows
        rows = local_rows.new_zeros(num, *local_rows.shape[1:])
        rows[self.shard(num)] = local_rows.detach()
        dist.all_reduce(rows)
        rows[self.shard(num)] = local_rows  # the same numbers, now with their gradient
        return rows

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Return the network with gradients averaged over the ranks and batch norms over the whole batch (in place)."""
        if self.world_size == 1:
            return network
        with warnings.catch_warnings():  # newer versions of torch have another name for the option
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(convert_global_batch_norm_(network), broadcast_buffers=False)

    def local_device(self, device: torch.device) -> torch.device:
        """Return the GPU of this rank, or `device` where no GPU is used.

        Raises:
            InputError: If there are fewer GPUs than processes.
        """
        if self.world_size == 1 or device.type != "cuda":
            return device
        if torchrun.local_world_size() > torch.cuda.device_count():
            raise InputError(
                "torchrun: each process of a machine needs a GPU of its own, "
                f"there are {torchrun.local_world_size()} processes and {torch.cuda.device_count()} GPUs\n"
                f"Use --nproc-per-node={torch.cuda.device_count()}, or machine.device=cpu."
            )
        torch.cuda.set_device(torchrun.local_rank())
        return torch.device("cuda", torchrun.local_rank())


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Initialise the process group of torchrun until the block ends, or ProcessLostError if another process ends before.

    Yields SINGLE_PROCESS without torchrun.
    """
    if torchrun.world_size() == 1:
        yield SINGLE_PROCESS
        return
    # gloo transfers what is in main memory, so that Python objects never wait for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield ProcessGroup(rank=dist.get_rank(), world_size=dist.get_world_size())
    except RuntimeError as error:
        # gloo has no error class of its own; errors of the computation pass through.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ProcessLostError(
            f"another of the {dist.get_world_size()} processes of this training has ended: {error}\n"
            "Its message is above, and its exit code in torchrun's summary below. "
            "Give the same command again: training goes on after the last complete epoch."
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for the others


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
    """Batch norm with given statistics, whose backward pass treats them as functions of the inputs of all processes.

    Gradients are those of the sum of the losses of all processes.
    """

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
