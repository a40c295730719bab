"""Paths of a workspace, and the result that a stage returns. Nothing here opens a file."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from prostate_seg.config.schema import Config


class FoldRecord:
    """Receives progress events of the training of one fold; this one records nothing."""

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Receive the metrics of an epoch, counted from 1."""

    def finish(self, metrics: Mapping[str, float], figures: Sequence[Path]) -> None:
        """Receive the metrics and figures of the finished fold."""


OpenFold = Callable[[int], AbstractContextManager[FoldRecord]]
"""Opens the record of a fold by its index; the context spans the training."""


def null_fold_record(_index: int) -> AbstractContextManager[FoldRecord]:
    """Open a record that records nothing."""
    return nullcontext(FoldRecord())


class Below:
    """A file or folder of a workspace, by its path below the root."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts

    def __get__(self, workspace: "Workspace", _: object = None) -> Path:
        return workspace.root.joinpath(*self.parts)


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

    ds_version_json = Below("DS_VERSION.json")
    """Newest finished run of each stage."""
    preprocess = Below("preprocess")
    """Folder of preprocessed images and masks, dataset.csv, thumbnails.npy, the log and contract.json."""
    dataset_csv = Below("preprocess", "dataset.csv")
    """Table with one row per usable case."""
    thumbnails_npy = Below("preprocess", "thumbnails.npy")
    """Thumbnail of each case, in the order of dataset.csv, for the search for near-duplicates."""
    contract_json = Below("preprocess", "contract.json")
    """Preprocessing settings that train, evaluate and predict must repeat."""
    kfold_json = Below("prepared", "kfold.json")
    """Case ids of train, val and test per fold."""
    evaluation = Below("evaluation")
    """Folder of cases.csv, metrics.json, predicted masks and overlays."""
    external_evaluation = Below("evaluation_external")
    """Evaluation on an external data folder."""
    inspection = Below("inspect")
    """Summary of a data set: cases.csv, findings.csv, summary.json, contact_sheet.png."""
    comparison = Below("comparison")
    """Comparison of runs: comparison.csv, comparison.json, comparison.png."""
    stress = Below("stress")
    """Stress test: cases.csv, curves.csv, stress.json, stress.png."""
    report = Below("report")
    """Folder of report.html, model_card.md and the tables behind the plots."""
    external_report = Below("report_external")
    """Report of the evaluation on an external data folder."""

    @property
    def model(self) -> Path:
        """Folder of finished folds, with weights and history, and of folds.json."""
        return (self.trained or self.root) / "model"

    def fold(self, fold_index: int) -> Path:
        """Folder of the weights and history of one fold."""
        return self.model / f"fold{fold_index}"

    @property
    def training(self) -> Path:
        """Folder of the unfinished folds, fold0 and so on; model/ holds finished ones only."""
        return (self.trained or self.root) / ".training"


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
    description: str = ""
    """The result in a few lines of Markdown, at the top of the run's page in MLflow."""
    objectives: Mapping[str, float] = field(default_factory=dict)
    """Of train, for a sweep: `objective`, the mean over the folds of the best val Dice, never a metric of test cases; and
    `seconds`, the training time over all folds and interruptions."""


def workspace_of(cfg: Config) -> Workspace:
    """Return the workspace that a config names."""
    root = Path(cfg.paths.root)
    return Workspace(
        root=root,
        data=Path(cfg.data.root) if cfg.data.root is not None else root / "data",
        cache=Path(cfg.paths.cache),
        trained=None if cfg.paths.trained is None else Path(cfg.paths.trained),
    )
