"""A resumed training is bit-identical to an uninterrupted one; a damaged checkpoint is set aside."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from prostate_seg.segmentation.networks.settings import ModelName
from prostate_seg.segmentation.networks.storage import save_weights
from prostate_seg.segmentation.training.checkpoints import Checkpoints, TrainingState
from prostate_seg.segmentation.training.history import Epoch
from prostate_seg.segmentation.training.packing import PackedSet
from tests.segmentation_helpers import model_2d, packed_discs, small_model, train_settings
from tests.test_training import TRAIN, VAL, run_fit


class Stopped(Exception):  # noqa: N818 - a signal, not an error
    pass


@pytest.fixture
def packed(tmp_path: Path) -> PackedSet:
    return packed_discs(tmp_path / "packed", TRAIN + VAL)


def stop_after(epoch: int) -> object:
    def on_epoch_end(one: Epoch) -> None:
        if one.epoch == epoch:
            raise Stopped

    return on_epoch_end


@pytest.mark.parametrize("stops", [[1], [3], [2, 4]])
def test_resumed_training_is_bit_identical_to_uninterrupted_training(
    packed: PackedSet, tmp_path: Path, stops: list[int]
) -> None:
    settings, model = train_settings(max_epochs=6, precision="auto"), replace(model_2d(), dropout=0.2)
    whole, weights = run_fit(packed, settings, model=model)
    checkpoints = Checkpoints(folder=tmp_path / "checkpoints", identity="x")
    for stop in stops:
        with pytest.raises(Stopped):
            run_fit(packed, settings, model=model, checkpoints=checkpoints, on_epoch_end=stop_after(stop))  # type: ignore[arg-type]
    seen: list[int] = []
    resumed, same = run_fit(
        packed, settings, model=model, checkpoints=checkpoints, on_epoch_end=lambda epoch: seen.append(epoch.epoch)
    )
    assert [(e.epoch, e.loss, e.val_dice, e.learning_rate) for e in resumed] == [
        (e.epoch, e.loss, e.val_dice, e.learning_rate) for e in whole
    ]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(list(checkpoints.folder.iterdir())) == 2


@pytest.mark.parametrize("name", get_args(ModelName))
def test_every_network_can_be_interrupted_and_resumed(packed: PackedSet, tmp_path: Path, name: ModelName) -> None:
    settings, model = train_settings(max_epochs=2), small_model(name)
    _, weights = run_fit(packed, settings, model=model)
    checkpoints = Checkpoints(folder=tmp_path / "checkpoints", identity="x")
    with pytest.raises(Stopped):
        run_fit(packed, settings, model=model, checkpoints=checkpoints, on_epoch_end=stop_after(1))  # type: ignore[arg-type]
    _, same = run_fit(packed, settings, model=model, checkpoints=checkpoints)
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    save_weights(tmp_path, same)


def test_damaged_checkpoint_is_set_aside_and_the_previous_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(folder=tmp_path, identity="x")
    for epoch in (1, 2):
        state = TrainingState(tensors={"network.a": torch.full((64,), float(epoch))}, facts={"epoch": epoch})
        checkpoints.save(state, epoch=epoch)
    newest = tmp_path / "epoch000002_x.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1  # one bit of one weight
    newest.write_bytes(content)
    found = checkpoints.newest()
    assert found is not None
    assert found.facts == {"epoch": 1}
    assert torch.equal(found.part("network")["a"], torch.ones(64))
    assert "epoch000002_x.safetensors is damaged" in caplog.text
    assert (tmp_path / "epoch000002_x.safetensors.damaged").is_file()
    (tmp_path / "epoch000001_x.safetensors").write_bytes(content[:100])
    assert checkpoints.newest() is None


def test_checkpoints_of_another_training_are_kept_beside_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other training was stopped at a later epoch."""
    first, second = (Checkpoints(folder=tmp_path, identity=identity) for identity in ("x", "y"))
    for checkpoints, epochs in ((first, (8, 9)), (second, (1, 2, 3))):
        for epoch in epochs:
            checkpoints.save(TrainingState(tensors={"a": torch.ones(1)}, facts={"epoch": epoch}), epoch=epoch)
    with caplog.at_level("INFO"):
        found = [checkpoints.newest() for checkpoints in (first, second)]
    assert [state.facts["epoch"] for state in found if state] == [9, 3]
    assert len(list(tmp_path.iterdir())) == 4
    assert "another training" not in caplog.text


def test_checkpoint_of_an_earlier_version_is_ignored_with_the_reason(
    packed: PackedSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name has no identity, and its optimiser one group of parameters."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    tensors = {"optimizer.0.exp_avg": torch.ones(1)}
    save_file(tensors, folder / "epoch000007.safetensors", metadata={"identity": "x", "facts": "{}", "md5": ""})
    with caplog.at_level("INFO"):
        history, _ = run_fit(
            packed, train_settings(max_epochs=1), checkpoints=Checkpoints(folder=folder, identity="xyz")
        )
    assert [epoch.epoch for epoch in history] == [1]
    assert f"training starts at epoch 1: the checkpoints in {folder} belong to another training" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["epoch000001_xyz.safetensors", "epoch000007.safetensors"]


def test_checkpoint_of_another_training_is_not_used(tmp_path: Path) -> None:
    Checkpoints(folder=tmp_path, identity="x").save(TrainingState(tensors={"a": torch.ones(1)}, facts={}), epoch=1)
    assert Checkpoints(folder=tmp_path, identity="y").newest() is None
    assert Checkpoints(folder=tmp_path, identity="x").newest() is not None
    assert Checkpoints(folder=tmp_path / "absent", identity="x").newest() is None


def test_values_of_every_type_round_trip(tmp_path: Path) -> None:
    checkpoints = Checkpoints(folder=tmp_path, identity="x")
    tensors = {"a": torch.tensor(3), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(1.5)}
    checkpoints.save(TrainingState(tensors=tensors, facts={"x": [1]}), epoch=1)
    found = checkpoints.newest()
    assert found is not None
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors.items())
