"""All random streams of a training differ: between seeds, folds, epochs, processes and purposes."""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import model_selection

from prostate_seg.common.seeds import Stream, seed_sequence, torch_seed
from prostate_seg.config.schema import parse
from prostate_seg.data.folds import kfold
from prostate_seg.segmentation.networks.storage import Recipe
from prostate_seg.segmentation.training import training
from prostate_seg.segmentation.training.distributed import ProcessGroup
from prostate_seg.segmentation.training.packing import Batches
from prostate_seg.stages.train import fit_fold
from tests.conftest import composed
from tests.data_helpers import case_record
from tests.segmentation_helpers import SETTINGS, model_2d, packed_discs, train_settings

SEEDS, FOLDS = (0, 1, 2, 12345, 2**32 - 1), (0, 1, 2)


def test_streams_of_all_seeds_folds_purposes_epochs_and_ranks_differ() -> None:
    counters = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    grid = list(product(SEEDS, FOLDS, Stream, counters))
    sequences = [seed_sequence(stream, *one, seed=seed, fold_index=fold) for seed, fold, stream, one in grid]
    sequences += [np.random.SeedSequence(seed) for seed in SEEDS]  # assigns the test subsets
    assert len({torch_seed(sequence) for sequence in sequences}) == len(grid) + len(SEEDS)
    for bits in (np.uint32, np.uint64):  # torch seeds a generator of the CPU with 32 bits
        assert len({int(sequence.generate_state(1, bits)[0]) for sequence in sequences}) == len(sequences)


def test_stream_is_the_same_on_every_machine() -> None:
    """A change of these numbers changes every result, and belongs in the changelog."""
    assert torch_seed(seed_sequence(Stream.initial_weights, seed=12345)) == 1541481317522987174
    assert torch_seed(seed_sequence(Stream.dropout, 3, 1, seed=12345, fold_index=2)) == 11341899924400627515


class Recorded(Exception):  # noqa: N818 - ends a training once its seeds are known
    pass


def seeds_of_training(monkeypatch: pytest.MonkeyPatch, data: Path, *, seed: int, fold_index: int) -> tuple[int, ...]:
    """Return the seeds of initial weights, dropout, batch order and augmentation of the first epoch."""
    found: list[int] = []

    def build_network(_model: object, **_: object) -> torch.nn.Module:
        found.append(torch.initial_seed())
        return torch.nn.Conv2d(1, 1, 1)

    def order(_: Batches, batch_size: int, *, num_batches: int, rng: np.random.Generator) -> np.ndarray:
        found.append(rng.bit_generator.state["state"]["state"])  # type: ignore[index, call-overload]
        return np.zeros((num_batches, batch_size), dtype=np.int64)

    def take(take_step: partial[torch.Tensor], *_: object) -> None:
        found.extend([torch.initial_seed(), take_step.keywords["rng"].initial_seed()])
        raise Recorded

    monkeypatch.setattr("prostate_seg.stages.train.build_network", build_network)
    monkeypatch.setattr(Batches, "order", order)
    monkeypatch.setattr(training, "_with_fitting_micro_batches", take)
    recipe = Recipe(model=model_2d(), preprocess=SETTINGS, zscore=False, train_ids=["a"], val_ids=["b"])
    cfg = replace(parse(composed(f"seed={seed}", "machine.device=cpu")), train=train_settings())
    with pytest.raises(Recorded):
        fit_fold(cfg, recipe, data, fold_index=fold_index, group=ProcessGroup())
    return tuple(found)


def test_trainings_of_other_seeds_and_folds_share_no_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seed 1 with fold 1 was seed 2 with fold 0 when the two were added up."""
    data = tmp_path / "packed"
    packed_discs(data, ["a", "b"])
    grid = list(product((1, 2, 3), (0, 1, 2)))
    seeds = {one: seeds_of_training(monkeypatch, data, seed=one[0], fold_index=one[1]) for one in grid}
    assert seeds[1, 1] == seeds_of_training(monkeypatch, data, seed=1, fold_index=1)
    assert len({value for found in seeds.values() for value in found}) == 4 * len(grid)


def test_val_subsets_of_other_seeds_and_folds_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case_record(f"p{i}_0", gland_volume_ml=20.0 + i) for i in range(12)]
    states = []

    def split(patients: list[str], *, test_size: int, stratify: np.ndarray, random_state: int) -> list[list[str]]:
        assert len(stratify) == len(patients)
        states.append(random_state)
        return [patients[test_size:], patients[:test_size]]

    monkeypatch.setattr(model_selection, "train_test_split", split)
    for seed in (1, 2, 3):
        kfold(cases, num_folds=3, val_fraction=0.2, seed=seed)
    assert len(set(states)) == 9
