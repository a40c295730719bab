"""How a trial stands: the same steps and values whichever way its folds train."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from prostate_seg.common.errors import Pruned
from prostate_seg.config.workspace import null_fold_record
from prostate_seg.sweeping.pruning import Standing


class Told:
    """Remembers what it is told; hopeless below 0.3."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []

    def __call__(self, step: int, value: float) -> bool:
        self.steps.append((step, round(value, 6)))
        return value < 0.3


def train(told: Told, looks: Sequence[tuple[int, int, float]], ends: Mapping[int, float]) -> None:
    """Train two folds of four epochs, one after the other, with looks at val as (fold, epoch, Dice)."""
    standing = Standing(told, num_folds=2, max_epochs=4)
    for index, best in ends.items():
        with standing.watched(null_fold_record)(index) as record:
            for fold, epoch, dice in looks:
                if fold == index:
                    record.on_epoch_end(epoch, {"train/loss": 1.0, "val/dice": dice})
            record.on_epoch_end(4, {"train/loss": 1.0})  # no look at val, nothing to tell
            record.finish({"val/best_dice": best}, list[Path]())


def test_value_is_the_mean_of_the_best_looks_and_a_fold_that_ended_early_counts_whole() -> None:
    told = Told()
    train(told, [(0, 1, 0.5), (0, 2, 0.4), (1, 1, 0.7)], {0: 0.5, 1: 0.9})
    assert told.steps == [(1, 0.5), (2, 0.5), (4, 0.5), (5, 0.6), (8, 0.7)]


def test_end_of_a_fold_after_a_look_at_its_last_epoch_is_told_once() -> None:
    told = Told()
    train(told, [(0, 4, 0.5)], {0: 0.5})
    assert told.steps == [(4, 0.5)]


def test_hopeless_trial_stops_in_a_fold_and_between_folds_but_not_when_all_is_done() -> None:
    with pytest.raises(Pruned, match=r"val Dice 0.200 after epoch 2 of fold 0 is hopeless"):
        train(Told(), [(0, 1, 0.5), (0, 2, 0.2)][1:], {0: 0.5})
    with pytest.raises(Pruned, match="epoch 4 of fold 0"):
        train(Told(), [], {0: 0.2, 1: 0.9})
    standing = Standing(Told(), num_folds=1, max_epochs=4)
    standing.end_fold(0, 0.1)
