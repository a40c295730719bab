"""Processes of a team: their parts of a batch, what they agree on, and batch norm over all of them."""

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
from prostate_seg.segmentation.training.distributed import Team
from prostate_seg.segmentation.training.global_batch_norm import normalise_globally_


def in_two_processes(work: Callable[[Team], object], folder: Path) -> list[object]:
    """Return what two processes make of a function of this module, in order."""
    mp.spawn(_be_one, args=(work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _be_one(rank: int, work: Callable[[Team], object], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(work(Team(rank=rank, size=2)), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("num", "size"), [(8, 2), (7, 2), (5, 3), (2, 2)])
def test_parts_are_disjoint_complete_and_nearly_equal(num: int, size: int) -> None:
    parts = [list(range(num))[Team(rank=rank, size=size).part(num)] for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def _talk(team: Team) -> tuple[str, list[int], torch.Tensor, torch.Tensor]:
    of_first = team.of_first(lambda: f"said by {team.rank}")
    mine = torch.full((2 if team.rank else 1, 2), float(team.rank + 1), requires_grad=True)
    rows = team.whole(mine, 3)
    (rows * torch.arange(6.0).reshape(3, 2)).sum().backward()
    assert mine.grad is not None
    return of_first, team.gathered([team.rank, 10 + team.rank]), rows.detach(), mine.grad


def test_what_the_processes_tell_each_other(tmp_path: Path) -> None:
    first, second = in_two_processes(_talk, tmp_path)
    for told in (first, second):
        assert isinstance(told, tuple)
        assert told[0] == "said by 0"
        assert told[1] == [0, 10, 1, 11]
        assert told[2].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    assert first[3].tolist() == [[0, 1]]  # the gradient of the own rows and of no others
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


def _pass_through(network: nn.Module, inputs: torch.Tensor, team: Team) -> dict[str, torch.Tensor]:
    """Return gradients of inputs and weights and the running statistics after one pass with the loss of the whole batch."""
    inputs.requires_grad_()
    target = torch.linspace(-1, 1, 5 * 2 * 2 * 4).reshape(5, 2, 2, 4)
    logits = team.whole(network(inputs), 5)
    ((logits - target) ** 3).mean().backward()
    of_weights = {name: weight.grad for name, weight in network.named_parameters()}
    if team.size > 1:
        for gradient in of_weights.values():
            dist.all_reduce(gradient)
    assert inputs.grad is not None
    found = {"inputs": inputs.grad, "logits": logits.detach(), **of_weights}
    return {name: value for name, value in {**found, **dict(network.named_buffers())}.items() if value is not None}


def _normalise_together(team: Team) -> dict[str, torch.Tensor]:
    return _pass_through(normalise_globally_(_network()), _inputs()[team.part(5)].clone(), team)


def test_batch_norm_of_two_processes_is_that_of_their_whole_batch(tmp_path: Path) -> None:
    expected = _pass_through(_network(), _inputs(), Team())
    parts = in_two_processes(_normalise_together, tmp_path)
    for rank, found in enumerate(parts):
        assert isinstance(found, dict)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            wanted = expected[name][Team(rank=rank, size=2).part(5)] if name == "inputs" else expected[name]
            torch.testing.assert_close(
                value, wanted, rtol=2e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_what_several_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # Slurm, MPI and others set it too
    assert torchrun.world_size() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert torchrun.world_size() == 4
    require_one_training(["stage=train", "train.learning_rate=1e-3"])
    for words in (["stage=evaluate"], ["-m", "stage=train"], ["stage=train", "--cfg=job"], ["stage=train", "--help"]):
        with pytest.raises(ConfigError, match="torchrun: its 4 processes share one stage=train"):
            require_one_training(words)
