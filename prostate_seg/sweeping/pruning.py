"""Pruning: reports the progress of a trial to its study after each validation and each fold; unpromising trials stop early.

The value is the mean of the best val Dice of the folds begun so far; at the end it equals the trial's objective. The step is
the number of epochs over all folds; a finished fold counts with all of its epochs, so that trials are compared at equal steps.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from prostate_seg.common.errors import Pruned
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import FoldRecord, OpenFold
from prostate_seg.sweeping.cost_estimate import num_folds_of
from prostate_seg.sweeping.identity import is_study, trial_number

ShouldPrune = Callable[[int, float], bool]
"""Reports step and value of a trial to its study, and returns whether the trial should stop."""


def with_pruning(open_fold: OpenFold, cfg: Config, hydra: DictConfig) -> OpenFold:
    """Return `open_fold` with records that report to the study; unchanged for jobs that are not trials of a study."""
    if not is_study(hydra):
        return open_fold
    from prostate_seg.sweeping.study import pruning_check  # imports optuna

    should_prune = pruning_check(
        hydra.sweeper.storage,
        hydra.sweeper.study_name,
        number=trial_number(hydra),
        pruner=instantiate(hydra.sweeper.pruner, _execution_whitelist_=("optuna.pruners.*",)),
    )
    num_folds, max_epochs = num_folds_of(cfg), cfg.train.max_epochs
    return TrialProgress(open_fold, should_prune, num_folds=num_folds, max_epochs=max_epochs).open_fold


class TrialProgress:
    """Progress of a trial over all of its folds, which may train in parallel."""

    def __init__(self, open_fold: OpenFold, should_prune: ShouldPrune, *, num_folds: int, max_epochs: int) -> None:
        self._open_fold = open_fold
        self._should_prune = should_prune
        self.max_epochs = max_epochs
        self._last_step = num_folds * max_epochs
        self._epochs: dict[int, int] = {}
        self._best: dict[int, float] = {}
        self._reported = 0
        self._lock = threading.Lock()

    def report(self, fold_index: int, epoch: int, val_dice: float) -> None:
        """Report the val Dice of a fold after an epoch.

        Raises:
            Pruned: If the trial should be pruned and is not finished.
        """
        with self._lock:
            self._epochs[fold_index] = epoch
            self._best[fold_index] = max(val_dice, self._best.get(fold_index, 0.0))
            step, value = sum(self._epochs.values()), sum(self._best.values()) / len(self._best)
            if step <= self._reported:  # the end of a fold after validation in its last epoch
                return
            self._reported = step
            if self._should_prune(step, value) and step < self._last_step:
                raise Pruned(f"pruned: val Dice {value:.3f} after epoch {epoch} of fold {fold_index} is unpromising")

    @contextmanager
    def open_fold(self, index: int) -> Iterator[FoldRecord]:
        """Open the record of a fold that reports here, too."""
        with self._open_fold(index) as record:
            yield _ReportingRecord(record, index, self)


class _ReportingRecord(FoldRecord):
    """The record of a fold, which reports to the trial's progress too."""

    def __init__(self, record: FoldRecord, index: int, progress: TrialProgress) -> None:
        self.record, self.index, self.progress = record, index, progress

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.record.on_epoch_end(epoch, metrics)
        if "val/dice" in metrics:
            self.progress.report(self.index, epoch, metrics["val/dice"])

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        self.record.finish(metrics, figures)
        self.progress.report(self.index, self.progress.max_epochs, metrics["val/best_dice"])
