"""Several processes that train one network, each with a part of every batch.

All of them draw the same batches, see the loss of the whole batch and take the same step, so that a training comes to what it
comes to in one process, up to rounding. What is decided by a clock or a file, the first process decides for all.
torch's own collectives and DistributedDataParallel do the work: through nccl between GPUs, through gloo between processors.
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
from torch.nn.parallel import DistributedDataParallel

from prostate_seg.common import torchrun
from prostate_seg.common.errors import InputError
from prostate_seg.segmentation.training.global_batch_norm import normalise_globally_

TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others, as while the first one packs the studies; one that has ended is noticed at once."""

Value = TypeVar("Value")


class TeamLostError(InputError):
    """Another process of the training has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """The processes of a training, as one of them sees them. Every process calls the same methods in the same order."""

    rank: int = 0
    size: int = 1

    def part(self, num: int) -> slice:
        """Return which of so many items this process takes; parts differ by one at most."""
        return slice(num * self.rank // self.size, num * (self.rank + 1) // self.size)

    def of_first(self, compute: Callable[[], Value]) -> Value:
        """Return what the first process computes; the others do not compute it."""
        if self.size == 1:
            return compute()
        box: list[Any] = [compute() if self.rank == 0 else None]
        dist.broadcast_object_list(box)
        return box[0]

    def gathered(self, values: list[Value]) -> list[Value]:
        """Return the values of all processes, in order."""
        if self.size == 1:
            return values
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, values)
        return [value for one in lists for value in one]

    def whole(self, mine: torch.Tensor, num: int) -> torch.Tensor:
        """Return all `num` rows of which each process has its part; gradients go back to the own rows."""
        if self.size == 1:
            return mine
        rows = mine.new_zeros(num, *mine.shape[1:])
        rows[self.part(num)] = mine.detach()
        dist.all_reduce(rows)
        rows[self.part(num)] = mine  # the same numbers, now with their gradient
        return rows

    def replica(self, network: nn.Module) -> nn.Module:
        """Return the network as this process runs it: its gradients become the mean over the processes.

        Its batch norms measure the whole batch from here on.
        """
        if self.size == 1:
            return network
        with warnings.catch_warnings():  # newer versions of torch have another name for the option
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(normalise_globally_(network), broadcast_buffers=False)

    def own_gpu(self, device: torch.device) -> torch.device:
        """Return the GPU of this process where GPUs are used.

        Raises:
            InputError: If the processes of this machine are more than its GPUs.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if torchrun.local_world_size() > torch.cuda.device_count():
            raise InputError(
                "torchrun: each process of a machine needs a GPU of its own, "
                f"there are {torchrun.local_world_size()} processes and {torch.cuda.device_count()} GPUs\n"
                f"Use --nproc-per-node={torch.cuda.device_count()}, or machine.device=cpu."
            )
        torch.cuda.set_device(torchrun.local_rank())
        return torch.device("cuda", torchrun.local_rank())


ALONE = Team()


@contextmanager
def join_team() -> Iterator[Team]:
    """Work with the processes that torchrun has started until the block ends; without torchrun, alone.

    Raises:
        TeamLostError: If one of them ends before.
    """
    if torchrun.world_size() == 1:
        yield ALONE
        return
    # gloo has what lies in main memory: no word between the processes waits for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield Team(rank=dist.get_rank(), size=dist.get_world_size())
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        raise TeamLostError(
            f"another of the {dist.get_world_size()} processes of this training has ended: {error}\n"
            "What it said stands above, and its exit code in what torchrun says below. "
            "Give the same command again: training goes on after the last complete epoch."
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for the others


def _is_of_connection(error: RuntimeError) -> bool:
    """Return whether a collective has failed, and not the computation; gloo has no error class of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
