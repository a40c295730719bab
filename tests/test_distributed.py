"""Process groups: shards of a batch, collectives, and batch norm over all processes."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from prostate_seg.cli import require_one_training
from prostate_seg.common import torchrun
from prostate_seg.common.errors import ConfigError
from prostate_seg.segmentation.training.distributed import ProcessGroup, convert_global_batch_norm_
from prostate_seg.segmentation.training.training_step import TrainingStep
from tests.segmentation_helpers import train_settings

# Imported once for all processes; optimisers use dynamo.
multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])


def in_two_processes(work: Callable[[ProcessGroup], object], folder: Path) -> list[object]:
    """Return the values of a function of this module in two processes, by rank."""
    mp.start_processes(_be_one, args=(work, folder), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _be_one(rank: int, work: Callable[[ProcessGroup], object], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(work(ProcessGroup(rank=rank, world_size=2)), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("num", "size"), [(8, 2), (7, 2), (5, 3), (2, 2)])
def test_shards_are_disjoint_complete_and_nearly_equal(num: int, size: int) -> None:
    parts = [list(range(num))[ProcessGroup(rank=rank, world_size=size).shard(num)] for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def _communicate(group: ProcessGroup) -> tuple[str, list[int], torch.Tensor, torch.Tensor]:
    from_rank0 = group.broadcast_from_rank0(lambda: f"sent by {group.rank}")
    mine = torch.full((2 if group.rank else 1, 2), float(group.rank + 1), requires_grad=True)
    rows = group.all_gather_rows(mine, 3)
    (rows * torch.arange(6.0).reshape(3, 2)).sum().backward()
    assert mine.grad is not None
    return from_rank0, group.all_gather([group.rank, 10 + group.rank]), rows.detach(), mine.grad


def test_collectives_return_the_values_of_all_ranks(tmp_path: Path) -> None:
    first, second = in_two_processes(_communicate, tmp_path)
    for received in (first, second):
        assert isinstance(received, tuple)
        assert received[0] == "sent by 0"
        assert received[1] == [0, 10, 1, 11]
        assert received[2].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    assert first[3].tolist() == [[0, 1]]  # the gradient of the rows of this rank only
    assert second[3].tolist() == [[2, 3], [4, 5]]


def _inputs() -> torch.Tensor:
    return (
        100
        + torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1.0, 2, 30])[:, None, None]
    )


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2, momentum=0.3))


def _pass_through(network: nn.Module, inputs: torch.Tensor, group: ProcessGroup) -> dict[str, torch.Tensor]:
    """Return gradients of inputs and weights and the running statistics after one pass with the loss of the whole batch."""
    inputs.requires_grad_()
    target = torch.linspace(-1, 1, 5 * 2 * 2 * 4).reshape(5, 2, 2, 4)
    logits = group.all_gather_rows(network(inputs), 5)
    ((logits - target) ** 3).mean().backward()
    of_weights = {name: weight.grad for name, weight in network.named_parameters()}
    if group.world_size > 1:
        for gradient in of_weights.values():
            dist.all_reduce(gradient)
    assert inputs.grad is not None
    found = {"inputs": inputs.grad, "logits": logits.detach(), **of_weights}
    return {name: value for name, value in {**found, **dict(network.named_buffers())}.items() if value is not None}


def _normalise_globally(group: ProcessGroup) -> dict[str, torch.Tensor]:
    return _pass_through(convert_global_batch_norm_(_network()), _inputs()[group.shard(5)].clone(), group)


def test_batch_norm_of_two_processes_is_that_of_their_whole_batch(tmp_path: Path) -> None:
    expected = _pass_through(_network(), _inputs(), ProcessGroup())
    parts = in_two_processes(_normalise_globally, tmp_path)
    for rank, found in enumerate(parts):
        assert isinstance(found, dict)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            wanted = (
                expected[name][ProcessGroup(rank=rank, world_size=2).shard(5)] if name == "inputs" else expected[name]
            )
            torch.testing.assert_close(
                value, wanted, rtol=2e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_commands_that_several_processes_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # Slurm, MPI and others set it too
    assert torchrun.world_size() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert torchrun.world_size() == 4
    require_one_training(["stage=train", "train.learning_rate=1e-3"])
    for words in (["stage=evaluate"], ["-m", "stage=train"], ["stage=train", "--cfg=job"], ["stage=train", "--help"]):
        with pytest.raises(ConfigError, match="torchrun: its 4 processes share one stage=train"):
            require_one_training(words)


def _regions_step(group: ProcessGroup) -> dict[str, torch.Tensor]:
    """Return loss and gradients of a step with three regions, whose Dice is pooled over the batch of all processes."""
    torch.manual_seed(0)
    network = nn.Conv2d(1, 3, 3, padding=1)
    step = TrainingStep(network, settings=train_settings(), device=torch.device("cpu"), volumetric=False, group=group)
    images = torch.randn(5, 1, 8, 8)
    masks = (torch.randn(5, 3, 8, 8) > torch.tensor([0.0, 1.0, 3.0])[:, None, None]).float()
    loss = step.backward(images, masks)
    return {
        "loss": loss,
        **{name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None},
    }


def test_loss_of_several_regions_in_two_processes_is_that_of_one(tmp_path: Path) -> None:
    alone = _regions_step(ProcessGroup())
    for found in in_two_processes(_regions_step, tmp_path):
        assert isinstance(found, dict)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value)
