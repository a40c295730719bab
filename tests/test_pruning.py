"""Reports of a trial: the same steps and values for any order of its folds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from prostate_seg.common.errors import Pruned
from prostate_seg.config.workspace import null_fold_record
from prostate_seg.sweeping.pruning import TrialProgress


class Recorder:
    """Records the reports; prunes below 0.3."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []

    def __call__(self, step: int, value: float) -> bool:
        self.steps.append((step, round(value, 6)))
        return value < 0.3


def train(recorder: Recorder, validations: Sequence[tuple[int, int, float]], ends: Mapping[int, float]) -> None:
    """Train two folds of four epochs, one after the other, with validations as (fold, epoch, Dice)."""
    progress = TrialProgress(null_fold_record, recorder, num_folds=2, max_epochs=4)
    for index, best in ends.items():
        with progress.open_fold(index) as record:
            for fold, epoch, dice in validations:
                if fold == index:
                    record.on_epoch_end(epoch, {"train/loss": 1.0, "val/dice": dice})
            record.on_epoch_end(4, {"train/loss": 1.0})  # no validation, no report
            record.finish({"val/best_dice": best}, list[Path]())


def test_value_is_the_mean_of_the_best_scores_including_folds_that_ended_early() -> None:
    recorder = Recorder()
    train(recorder, [(0, 1, 0.5), (0, 2, 0.4), (1, 1, 0.7)], {0: 0.5, 1: 0.9})
    assert recorder.steps == [(1, 0.5), (2, 0.5), (4, 0.5), (5, 0.6), (8, 0.7)]


def test_end_of_a_fold_after_validation_in_its_last_epoch_is_reported_once() -> None:
    recorder = Recorder()
    train(recorder, [(0, 4, 0.5)], {0: 0.5})
    assert recorder.steps == [(4, 0.5)]


def test_unpromising_trial_is_pruned_in_and_between_folds_but_not_at_its_end() -> None:
    with pytest.raises(Pruned, match=r"val Dice 0.200 after epoch 2 of fold 0 is unpromising"):
        train(Recorder(), [(0, 1, 0.5), (0, 2, 0.2)][1:], {0: 0.5})
    with pytest.raises(Pruned, match="epoch 4 of fold 0"):
        train(Recorder(), [], {0: 0.2, 1: 0.9})
    progress = TrialProgress(null_fold_record, Recorder(), num_folds=1, max_epochs=4)
    progress.report(0, 4, 0.1)
