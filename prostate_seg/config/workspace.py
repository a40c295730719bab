"""Where stages read and write, and what a stage hands back. Paths only; nothing here opens a file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from prostate_seg.config.schema import Config


class FoldRecord(Protocol):
    """Who is told how the training of one fold goes."""

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one epoch, counted from 1."""

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        """Take what the fold came to, and the pictures of it."""


OpenFold = Callable[[int], AbstractContextManager[FoldRecord]]
"""Starts the record of a fold by its index; the block around the training ends it."""


class _Nobody:
    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        pass

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        pass


@contextmanager
def unrecorded_fold(_index: int) -> Iterator[FoldRecord]:
    """Record nothing."""
    yield _Nobody()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """The folders of one pipeline, and who is told how training goes."""

    root: Path
    """Folder that holds all that stages write."""
    data: Path
    """Folder with images/ and masks/."""
    cache: Path
    """Folder for what can be made again at any time."""
    trained: Path | None = None
    """Folder of model/ and .training/; None for the root."""
    open_fold: OpenFold = unrecorded_fold
    """Called by training around each fold."""
    run_id: str | None = None
    """Id of the run that records the stage; None where nothing does."""

    @property
    def preprocess(self) -> Path:
        """Preprocessed images and masks, dataset.csv, reference_quality.csv, thumbnails.npy, the log and contract.json."""
        return self.root / "preprocess"

    @property
    def dataset_csv(self) -> Path:
        """One row per usable case."""
        return self.preprocess / "dataset.csv"

    @property
    def thumbnails_npy(self) -> Path:
        """A small picture of each case, in the order of dataset.csv, by which the leak gate finds copies."""
        return self.preprocess / "thumbnails.npy"

    @property
    def contract_json(self) -> Path:
        """The preprocessing settings that train, evaluate and predict must repeat."""
        return self.preprocess / "contract.json"

    @property
    def kfold_json(self) -> Path:
        """Case ids of train, val and test per fold."""
        return self.root / "prepared" / "kfold.json"

    @property
    def model(self) -> Path:
        """One folder of weights and history per fold, and folds.json."""
        return (self.trained or self.root) / "model"

    def fold(self, fold_index: int) -> Path:
        """Weights and history of one fold."""
        return self.model / f"fold{fold_index}"

    def unfinished_fold(self, fold_index: int) -> Path:
        """What a fold writes until it has finished; outside model/, which holds finished folds only."""
        return self.training / f"fold{fold_index}"

    @property
    def training(self) -> Path:
        """What a training keeps until all of its folds have finished."""
        return (self.trained or self.root) / ".training"

    @property
    def evaluation(self) -> Path:
        """cases.csv, metrics.json, predicted masks and overlays."""
        return self.root / "evaluation"

    @property
    def external_evaluation(self) -> Path:
        """The same for cases of another folder."""
        return self.root / "evaluation_external"

    @property
    def inspection(self) -> Path:
        """What a data set looks like: cases.csv, findings.csv, summary.json, contact_sheet.png."""
        return self.root / "inspect"

    @property
    def comparison(self) -> Path:
        """How runs differ: comparison.csv, comparison.json, comparison.png."""
        return self.root / "comparison"

    @property
    def report(self) -> Path:
        """report.html, model_card.md and the tables behind the plots."""
        return self.root / "report"

    @property
    def external_report(self) -> Path:
        """The same for cases of another folder."""
        return self.root / "report_external"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What a stage read, wrote and measured; the run records it."""

    inputs: list[Path] = field(default_factory=list)
    """Files and folders that decided the result."""
    outputs: list[Path] = field(default_factory=list)
    """Files and folders that were written."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers by name, such as test/dice."""
    figures: list[Path] = field(default_factory=list)
    """Pictures among the outputs worth a look."""
    tables: list[Path] = field(default_factory=list)
    """Small tables among the outputs worth a look."""
    reports: list[Path] = field(default_factory=list)
    """Pages among the outputs for people to read."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Verdicts in words, by name, such as leak_gate."""
    objective: float | None = None
    """What a sweep maximises: of a training the mean over its folds of the best val Dice; never a number of test cases."""
    seconds: float | None = None
    """What a sweep may minimise: the time of the training, over all of its folds and stops."""

    @property
    def sought(self) -> dict[str, float]:
        """Return what a sweep can look for, by name; empty for a stage that is no training."""
        both = {"objective": self.objective, "seconds": self.seconds}
        return {name: value for name, value in both.items() if value is not None}


def workspace_of(cfg: Config) -> Workspace:
    """Return the folders that a config names."""
    root = Path(cfg.paths.root)
    return Workspace(
        root=root,
        data=Path(cfg.data.root) if cfg.data.root is not None else root / "data",
        cache=Path(cfg.paths.cache),
        trained=None if cfg.paths.trained is None else Path(cfg.paths.trained),
    )
