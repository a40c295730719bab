"""Stage report: what was measured, on what, by what, as one page, as a model card and as the tables behind the plots."""

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import prostate_seg
from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.files import atomic_folder, read_json, write_csv, write_text
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.dataset import OWN_COLUMNS
from prostate_seg.data.loading import load_case
from prostate_seg.imaging.image_io import content_md5, read_volume
from prostate_seg.imaging.quality import whole_gland
from prostate_seg.provenance.ds_version import read_entries
from prostate_seg.reporting.analysis import all_tables
from prostate_seg.reporting.facts import Facts
from prostate_seg.reporting.gallery import GalleryCase, gallery_case, missing_case, worst_median_best
from prostate_seg.reporting.model_card import render_model_card
from prostate_seg.reporting.plots import all_plots
from prostate_seg.reporting.report import render_report
from prostate_seg.reporting.results import METRICS

log = logging.getLogger(__name__)

Row = Mapping[Hashable, Any]
"""A row of a table by column."""

PIPELINE = ("fetch", "preprocess", "prepare", "train", "evaluate")
"""Stages whose runs a report names, in order."""


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write report/ (or report_external/): report.html, model_card.md and a CSV file per plot."""
    external = cfg.evaluate.external_root
    evaluation = workspace.evaluation if external is None else workspace.external_evaluation
    target = workspace.report if external is None else workspace.external_report
    originals = workspace.data if external is None else Path(external)
    facts = load_facts(cfg, workspace, evaluation)
    tables = all_tables(facts)
    plots = all_plots(facts.cases, tables, facts.kept_epochs)
    gallery = load_gallery(cfg, facts.cases, originals=originals, masks=evaluation / "masks")
    with atomic_folder(target) as folder:
        write_text(folder / "report.html", render_report(facts, tables=tables, plots=plots, gallery=gallery))
        write_text(folder / "model_card.md", render_model_card(facts, subgroups=_records(tables["subgroups"])))
        for name, table in tables.items():
            write_csv(folder / f"{name}.csv", table, float_format="%.6g")
    log.info("open %s", target / "report.html")
    read = [originals, workspace.preprocess, workspace.kfold_json, workspace.model, evaluation]
    return StageResult(
        inputs=[path for path in read if path.exists()],
        outputs=[target],
        reports=[target / "report.html", target / "model_card.md"],
    )


def load_facts(cfg: Config, workspace: Workspace, evaluation: Path) -> Facts:
    """Read all that is known of an evaluation; only the evaluation must be there.

    Raises:
        InputError: If there is no evaluation, or an older version wrote it.
    """
    needed = [evaluation / name for name in ("cases.csv", "slices.csv", "metrics.json")]
    absent = [path for path in needed if not path.is_file()]
    if absent:
        raise InputError(f"{absent[0]} is absent: run stage=evaluate first, with the same evaluate.external_root")
    entries = _entries(workspace, evaluation)
    dataset = _table(workspace.dataset_csv, numbers=("num_slices", "spacing_y_mm", "spacing_z_mm", "gland_volume_ml"))
    folds = {path.name: path for path in sorted(workspace.model.glob("fold*"), key=_fold_number) if path.is_dir()}
    slices = _table(evaluation / "slices.csv", numbers=("position", "dice"))
    assert slices is not None
    return Facts(
        cases=_cases(evaluation / "cases.csv"),
        slices=slices,
        summary=read_json(evaluation / "metrics.json"),
        is_external=evaluation == workspace.external_evaluation,
        version=prostate_seg.__version__,
        num_bootstrap=cfg.evaluate.num_bootstrap,
        seed=cfg.seed,
        settings=_settings(entries, list(folds.values())),
        entries=entries,
        folds=read_json(workspace.kfold_json)["folds"] if workspace.kfold_json.is_file() else (),
        histories={
            name: pd.read_csv(path / "history.csv") for name, path in folds.items() if _has(path, "history.csv")
        },
        kept_epochs={
            name: read_json(path / "summary.json")["best_epoch"]
            for name, path in folds.items()
            if _has(path, "summary.json")
        },
        dataset=dataset,
        attribute_names=[] if dataset is None else [name for name in dataset.columns if name not in OWN_COLUMNS],
        reference_quality=_table(workspace.preprocess / "reference_quality.csv"),
        preprocess_log=_json(workspace.preprocess / "preprocess_log.json"),
    )


def load_gallery(cfg: Config, cases: pd.DataFrame, *, originals: Path, masks: Path) -> list[GalleryCase]:
    """Return the worst, the median and the best case; without pictures, and why, where the originals are not as they were."""
    try:
        found, _ = discover_cases(originals, patient_pattern=cfg.data.patient_pattern, exclude=())
    except InputError as error:
        log.warning("the gallery has no pictures: %s", error)
        found = []
    files = {case.case_id: case for case in found}
    rows = cases.to_dict("index")
    return [
        _gallery_case(cfg, rank, rows[index], files=files, masks=masks)
        for rank, index in worst_median_best(cases).items()
    ]


def _gallery_case(cfg: Config, rank: str, row: Row, *, files: dict[str, Case], masks: Path) -> GalleryCase:
    case_id, labels = str(row["case_id"]), cfg.data.whole_gland_labels
    metrics = {name: float(row[name]) for name in METRICS}
    case, mask_path = files.get(case_id), masks / str(row["fold"]) / f"{case_id}.nii.gz"
    if case is None or case.mask is None:
        return missing_case(rank, case_id, metrics, reason="its original image or mask is not there.")
    if (content_md5(case.image), content_md5(case.mask)) != (row["image_md5"], row["mask_md5"]):
        return missing_case(rank, case_id, metrics, reason="its image or mask has changed since it was measured.")
    loaded, quality = load_case(case, labels=labels)
    try:
        predicted = read_volume(mask_path).array > 0
    except VolumeError as error:
        return missing_case(rank, case_id, metrics, reason=f"its predicted mask cannot be read: {error}")
    if loaded is None or predicted.shape != loaded.image.array.shape:
        reason = "; ".join(finding.message for finding in quality.findings) or "its predicted mask is on another grid."
        return missing_case(rank, case_id, metrics, reason=reason)
    return gallery_case(
        rank,
        case_id,
        metrics,
        image=loaded.image.array,
        reference=whole_gland(loaded.mask.array, labels=labels),
        predicted=predicted,
        spacing_mm=loaded.image.geometry.spacing_mm,
    )


def _entries(workspace: Workspace, evaluation: Path) -> dict[str, dict[str, Any]]:
    """Return what is recorded of the pipeline's stages, in order; of evaluate only if it wrote this evaluation."""
    known = read_entries(workspace)
    if evaluation.name not in known.get("evaluate", {}).get("outputs", {}):
        known.pop("evaluate", None)
    return {name: known[name] for stage in PIPELINE for name in sorted(known) if name.split(".")[0] == stage}


def _settings(entries: dict[str, dict[str, Any]], folds: list[Path]) -> dict[str, Any]:
    """Return each group of settings as the stage that it decides recorded it, or as the first fold keeps it."""
    recorded = {stage.split(".")[0]: entry["settings"] for stage, entry in entries.items()}
    kept = [path / "config.yaml" for path in folds if _has(path, "config.yaml")]
    settings: dict[str, Any] = yaml.safe_load(kept[0].read_text(encoding="utf-8")) if kept else {}
    deciding = {"preprocess": ("data", "preprocess"), "prepare": ("fold",), "train": ("seed", "model", "train")}
    for stage, groups in (deciding | {"evaluate": ("evaluate",)}).items():
        settings |= {group: recorded[stage][group] for group in groups if stage in recorded}
    return settings


def _cases(path: Path) -> pd.DataFrame:
    missing = [name for name in METRICS if name not in pd.read_csv(path, nrows=0).columns]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}: an older version wrote it\nRun stage=evaluate again.")
    cases = _table(path, numbers=METRICS)
    assert cases is not None
    return cases.assign(missed_gland=cases["missed_gland"] == "True")


def _table(path: Path, numbers: tuple[str, ...] = ()) -> pd.DataFrame | None:
    """Return a table as text but for its numbers, so that an id such as 007 stays what it is; None if it is absent."""
    if not path.is_file():
        return None
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.assign(**{name: pd.to_numeric(table[name]) for name in numbers})


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _fold_number(path: Path) -> tuple[int, str]:
    return len(path.name), path.name  # fold10 comes after fold9


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
