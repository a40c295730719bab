"""Paths of a workspace, and the result that a stage returns. Nothing here opens a file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from prostate_seg.config.schema import Config


class FoldRecord(Protocol):
    """Receives progress events of the training of one fold."""

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Receive the metrics of an epoch, counted from 1."""

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        """Receive the metrics and figures of the finished fold."""


OpenFold = Callable[[int], AbstractContextManager[FoldRecord]]
"""Opens the record of a fold by its index; the context spans the training."""


class NullFoldRecord:
    """Records nothing."""

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Ignore the metrics."""

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        """Ignore the metrics and figures."""


@contextmanager
def null_fold_record(_index: int) -> Iterator[FoldRecord]:
    """Open a record that records nothing."""
    yield NullFoldRecord()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Folders of one pipeline, and the record of its training."""

    root: Path
    """Folder of all outputs of stages."""
    data: Path
    """Folder with images/ and masks/."""
    cache: Path
    """Folder of files that can be made again at any time."""
    trained: Path | None = None
    """Folder of model/ and .training/; None for the root."""
    open_fold: OpenFold = null_fold_record
    """Opens the record of a fold around its training."""
    run_id: str | None = None
    """Id of the run that records the stage; None if none does."""

    @property
    def preprocess(self) -> Path:
        """Folder of preprocessed images and masks, dataset.csv, thumbnails.npy, the log and contract.json."""
        return self.root / "preprocess"

    @property
    def dataset_csv(self) -> Path:
        """Table with one row per usable case."""
        return self.preprocess / "dataset.csv"

    @property
    def thumbnails_npy(self) -> Path:
        """Thumbnail of each case, in the order of dataset.csv, for the search for near-duplicates."""
        return self.preprocess / "thumbnails.npy"

    @property
    def contract_json(self) -> Path:
        """Preprocessing settings that train, evaluate and predict must repeat."""
        return self.preprocess / "contract.json"

    @property
    def kfold_json(self) -> Path:
        """Case ids of train, val and test per fold."""
        return self.root / "prepared" / "kfold.json"

    @property
    def model(self) -> Path:
        """Folder of finished folds, with weights and history, and of folds.json."""
        return (self.trained or self.root) / "model"

    def fold(self, fold_index: int) -> Path:
        """Folder of the weights and history of one fold."""
        return self.model / f"fold{fold_index}"

    @property
    def training(self) -> Path:
        """Folder of the files that a training keeps until all of its folds have finished."""
        return (self.trained or self.root) / ".training"

    def unfinished_fold(self, fold_index: int) -> Path:
        """Folder of an unfinished fold; model/ holds finished folds only."""
        return self.training / f"fold{fold_index}"

    @property
    def evaluation(self) -> Path:
        """Folder of cases.csv, metrics.json, predicted masks and overlays."""
        return self.root / "evaluation"

    @property
    def external_evaluation(self) -> Path:
        """Evaluation on an external data folder."""
        return self.root / "evaluation_external"

    @property
    def inspection(self) -> Path:
        """Summary of a data set: cases.csv, findings.csv, summary.json, contact_sheet.png."""
        return self.root / "inspect"

    @property
    def comparison(self) -> Path:
        """Comparison of runs: comparison.csv, comparison.json, comparison.png."""
        return self.root / "comparison"

    @property
    def report(self) -> Path:
        """Folder of report.html, model_card.md and the tables behind the plots."""
        return self.root / "report"

    @property
    def external_report(self) -> Path:
        """Report of the evaluation on an external data folder."""
        return self.root / "report_external"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """Inputs, outputs and metrics of a stage, for the run that records it."""

    inputs: list[Path] = field(default_factory=list)
    """Files and folders that decided the result."""
    outputs: list[Path] = field(default_factory=list)
    """Files and folders that were written."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics by key, such as test/dice."""
    figures: list[Path] = field(default_factory=list)
    """Figures among the outputs."""
    tables: list[Path] = field(default_factory=list)
    """Small tables among the outputs."""
    reports: list[Path] = field(default_factory=list)
    """HTML and Markdown pages among the outputs."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of the run, such as leak_gate."""
    objective: float | None = None
    """Objective of a sweep: mean over the folds of the best val Dice; never a metric of test cases."""
    seconds: float | None = None
    """Second objective of a sweep: training time over all folds and interruptions."""

    @property
    def objectives(self) -> dict[str, float]:
        """Return the objectives of a sweep by name; empty for every stage but train."""
        both = {"objective": self.objective, "seconds": self.seconds}
        return {name: value for name, value in both.items() if value is not None}


def workspace_of(cfg: Config) -> Workspace:
    """Return the workspace that a config names."""
    root = Path(cfg.paths.root)
    return Workspace(
        root=root,
        data=Path(cfg.data.root) if cfg.data.root is not None else root / "data",
        cache=Path(cfg.paths.cache),
        trained=None if cfg.paths.trained is None else Path(cfg.paths.trained),
    )
