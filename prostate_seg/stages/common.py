"""What several stages share: the config's preprocessing as a contract, and what lies in the workspace, checked."""

from prostate_seg.config import Config
from prostate_seg.data.dataset import CaseRow, read_dataset, require_contract
from prostate_seg.data.folds import Fold, chosen_folds, read_folds
from prostate_seg.data.leak_gate import stop_on_leaks
from prostate_seg.imaging.preprocessing import PreprocessSettings
from prostate_seg.workspace import Workspace


def preprocess_settings(cfg: Config) -> PreprocessSettings:
    """Return all of the config that decides what a network sees."""
    spacing, labels = cfg.preprocess.spacing_mm, cfg.data.whole_gland_labels
    low, high = cfg.preprocess.intensity_percentiles
    return PreprocessSettings(
        spacing_mm=None if spacing is None else (spacing[0], spacing[1], spacing[2]),
        image_size=cfg.preprocess.image_size,
        crop=cfg.preprocess.crop.value,
        to_8bit=cfg.preprocess.to_8bit,
        intensity_percentiles=(low, high),
        whole_gland_labels=None if labels is None else tuple(labels),
    )


def checked_dataset(cfg: Config, workspace: Workspace) -> dict[str, CaseRow]:
    """Return dataset.csv after making sure that it was made with this config's preprocessing."""
    require_contract(workspace.contract_json, preprocess_settings(cfg))
    return read_dataset(workspace.dataset_csv)


def checked_folds(cfg: Config, workspace: Workspace, dataset: dict[str, CaseRow]) -> dict[int, Fold]:
    """Return the folds to work on, by index, after the leak gate has seen all of them."""
    folds = read_folds(workspace.kfold_json)
    stop_on_leaks(folds, identities={case_id: row.identity for case_id, row in dataset.items()})
    return chosen_folds(folds, index=cfg.fold.index)
