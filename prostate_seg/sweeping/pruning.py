"""How a trial stands while it trains, told to the study after each look at val and after each fold.

The value is the mean over the folds begun so far of their best val Dice: it becomes the trial's objective. The step is the
number of epochs done in all folds; a fold that has ended counts as all of its epochs, so that trials meet at the same steps.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from prostate_seg.common.errors import Pruned
from prostate_seg.config.workspace import FoldRecord, OpenFold

IsHopeless = Callable[[int, float], bool]
"""Takes the step and the value of a trial, and says whether it should stop."""


class Standing:
    """How a trial stands over all of its folds, which may train side by side."""

    def __init__(self, is_hopeless: IsHopeless, *, num_folds: int, max_epochs: int) -> None:
        self._is_hopeless = is_hopeless
        self._max_epochs = max_epochs
        self._last_step = num_folds * max_epochs
        self._epochs: dict[int, int] = {}
        self._best: dict[int, float] = {}
        self._told = 0
        self._lock = threading.Lock()

    def take(self, index: int, epoch: int, val_dice: float) -> None:
        """Take a look at val after an epoch of a fold.

        Raises:
            Pruned: If the trial is hopeless and there is still something to save.
        """
        with self._lock:
            self._epochs[index] = epoch
            self._best[index] = max(val_dice, self._best.get(index, 0.0))
            step, value = sum(self._epochs.values()), sum(self._best.values()) / len(self._best)
            if step <= self._told:  # the end of a fold after its last epoch
                return
            self._told = step
            if self._is_hopeless(step, value) and step < self._last_step:
                raise Pruned(f"stopped early: val Dice {value:.3f} after epoch {epoch} of fold {index} is hopeless")

    def end_fold(self, index: int, val_dice: float) -> None:
        """Take what a fold came to.

        Raises:
            Pruned: As `take`.
        """
        self.take(index, self._max_epochs, val_dice)

    def watched(self, open_fold: OpenFold) -> OpenFold:
        """Return `open_fold` with records that tell the standing too."""

        @contextmanager
        def open_watched(index: int) -> Iterator[FoldRecord]:
            with open_fold(index) as record:
                yield _Watched(record, index, self)

        return open_watched


class _Watched:
    """The record of a fold, and a word to the standing."""

    def __init__(self, record: FoldRecord, index: int, standing: Standing) -> None:
        self.record, self.index, self.standing = record, index, standing

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.record.on_epoch_end(epoch, metrics)
        if "val/dice" in metrics:
            self.standing.take(self.index, epoch, metrics["val/dice"])

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        self.record.finish(metrics, figures)
        self.standing.end_fold(self.index, metrics["val/best_dice"])
