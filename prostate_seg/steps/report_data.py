"""Data of the report and of the model card, read from an evaluation and the files of its workspace."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of, read_json
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.provenance.ds_version import read_entries
from prostate_seg.reporting.evaluation.tables import CASE_METRICS, by_region
from prostate_seg.reporting.evaluation.trust import read_trust
from prostate_seg.reporting.pages.report_tables import ReportData
from prostate_seg.steps.leak_gate import ancestors_in

STRESS = "stress.json"
"""Summary of a stress test."""
WEIGHTS_PATTERN = "fold*/weights.safetensors"
"""Pattern of the weights in a folder of networks; their module imports torch, which a report does not need."""

SETTINGS_OF_STAGE = {
    "preprocess": ("data", "preprocess"),
    "prepare": ("fold",),
    "train": ("seed", "model", "train"),
    "evaluate": ("evaluate",),
}
"""Groups of settings, by the stage whose record has the values that apply."""


def load_report_data(cfg: Config, workspace: Workspace, evaluation: Path) -> ReportData:
    """Read an evaluation of the present version and, as far as the workspace has it, the provenance of its results."""
    cases, slices, summary = _read_results(evaluation)
    dataset, quality = workspace.dataset_csv, workspace.preprocess / "reference_quality.csv"
    sizes = ("num_slices", "spacing_y_mm", "spacing_z_mm", "gland_volume_ml")
    preprocess_log = workspace.preprocess / "preprocess_log.json"
    trained = [path for path in workspace.model.glob("fold*") if path.is_dir()]
    trained.sort(key=lambda path: (len(path.name), path.name))  # fold10 after fold9
    records, settings = _read_records(workspace, evaluation, trained)
    stress = stress_of(workspace, workspace.model)
    is_external = evaluation == workspace.external_evaluation
    return ReportData(
        cases=cases.pop(WHOLE_GLAND),
        zones=cases,
        slices=slices,
        summary=summary,
        is_external=is_external,
        num_bootstrap=cfg.evaluate.num_bootstrap,
        seed=cfg.seed,
        settings=settings,
        records=records,
        folds=read_json(workspace.kfold_json)["folds"] if workspace.kfold_json.is_file() else (),
        histories={name: pd.read_csv(path) for name, path in _files(trained, "history.csv").items()},
        kept_epochs={name: read_json(path)["best_epoch"] for name, path in _files(trained, "summary.json").items()},
        dataset=_read_table(dataset, numeric=sizes) if dataset.is_file() else None,
        reference_quality=_read_table(quality) if quality.is_file() else None,
        preprocess_log=read_json(preprocess_log) if preprocess_log.is_file() else {},
        ancestors={path.name: ancestors_in(path) for path in trained},
        stress=stress,
        stress_curves=None if stress is None else pd.read_csv(workspace.stress / "curves.csv"),
        trust=read_trust(evaluation, summary, of_folds=workspace.evaluation if is_external else None),
    )


def _read_results(evaluation: Path) -> tuple[dict[str, pd.DataFrame], pd.DataFrame, dict[str, Any]]:
    """Return the results of the cases by region, those of the gland's slices, and the summary."""
    cases_csv, slices_csv, metrics_json = (evaluation / name for name in ("cases.csv", "slices.csv", "metrics.json"))
    for path in (cases_csv, slices_csv, metrics_json):
        if not path.is_file():
            raise InputError(f"{path} is absent: run stage=evaluate first, with the same evaluate.external_root")
    columns = pd.read_csv(cases_csv, nrows=0).columns
    if missing := ", ".join(name for name in CASE_METRICS if name not in columns):
        raise InputError(f"{cases_csv} has no {missing}: an older version wrote it\nRun stage=evaluate again.")
    cases = _read_table(cases_csv, numeric=CASE_METRICS)
    slices = by_region(_read_table(slices_csv, numeric=("position", "dice")))[WHOLE_GLAND]
    return by_region(cases.assign(missed_gland=cases["missed_gland"] == "True")), slices, read_json(metrics_json)


def _read_records(
    workspace: Workspace, evaluation: Path, trained: Sequence[Path]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the records of the pipeline's stages in order, and the settings that they recorded."""
    known = read_entries(workspace)
    if evaluation.name not in known.get("evaluate", {}).get("outputs", {}):
        known.pop("evaluate", None)  # it recorded another evaluation
    # A training of single folds has a record per fold, such as train.fold0.
    order = ("fetch", *SETTINGS_OF_STAGE)
    records = {name: known[name] for stage in order for name in sorted(known) if name.split(".")[0] == stage}
    # Settings without a record are read from the first trained fold.
    kept = list(_files(trained, "config.yaml").values())
    settings: dict[str, Any] = yaml.safe_load(kept[0].read_text(encoding="utf-8")) if kept else {}
    for name, record in records.items():
        settings |= {group: record["settings"][group] for group in SETTINGS_OF_STAGE.get(name.split(".")[0], ())}
    return records, settings


def _read_table(path: Path, *, numeric: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV file as text, but for the numeric columns, so that an id such as 007 keeps its zeros."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.assign(**{name: pd.to_numeric(table[name]) for name in numeric})


def _files(folders: Sequence[Path], name: str) -> dict[str, Path]:
    """Return the file of one name in each folder that has it, by folder."""
    return {folder.name: folder / name for folder in folders if (folder / name).is_file()}


def stress_of(workspace: Workspace, networks: Path) -> dict[str, Any] | None:
    """Return stress.json of the workspace if it is a test of all networks in a folder, fold0 and so on; None otherwise."""
    file = workspace.stress / STRESS
    weights = {path.parent.name: md5_of(path) for path in networks.glob(WEIGHTS_PATTERN)}
    if not file.is_file() or not weights:
        return None
    found: dict[str, Any] = read_json(file)
    return found if weights.items() <= found["networks"].items() else None
