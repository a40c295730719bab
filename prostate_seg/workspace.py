"""Where stages read and write, and what a stage hands back. Paths only; nothing here opens a file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

EpochHook = Callable[[int, int, Mapping[str, float]], None]
"""Told after each epoch: fold index, epoch (from 1), metrics by name."""


def _no_epoch_hook(_fold: int, _epoch: int, _metrics: Mapping[str, float]) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """The folders of one pipeline, and who is told how training goes."""

    root: Path
    """Folder that holds all that stages write."""
    data: Path
    """Folder with images/ and masks/."""
    cache: Path
    """Folder for what can be made again at any time."""
    on_epoch_end: EpochHook = _no_epoch_hook
    """Called by training after each epoch of each fold."""

    @property
    def preprocess(self) -> Path:
        """Preprocessed images and masks, dataset.csv, preprocess_log.json, contract.json."""
        return self.root / "preprocess"

    @property
    def dataset_csv(self) -> Path:
        """One row per usable case."""
        return self.preprocess / "dataset.csv"

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
        return self.root / "model"

    def fold(self, fold_index: int) -> Path:
        """Weights and history of one fold."""
        return self.model / f"fold{fold_index}"

    @property
    def evaluation(self) -> Path:
        """cases.csv, metrics.json, predicted masks and overlays."""
        return self.root / "evaluation"

    @property
    def external_evaluation(self) -> Path:
        """The same for cases of another folder."""
        return self.root / "evaluation_external"


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
    objective: float | None = None
    """What a sweep maximises."""
