"""Stage report: report.html, model_card.md and the tables behind the plots, from an evaluation and its provenance."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder, md5_of, read_json, write_csv, write_text
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.loading import LoadedCase, load_case
from prostate_seg.imaging.image_io import content_md5, read_volume
from prostate_seg.imaging.quality import whole_gland
from prostate_seg.imaging.regions import Regions
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.provenance.ds_version import read_entries
from prostate_seg.reporting.comparison.unseen_groups import Elsewhere, expected_elsewhere
from prostate_seg.reporting.evaluation.tables import CASE_METRICS, by_region, summary_markdown
from prostate_seg.reporting.evaluation.trust import read_trust
from prostate_seg.reporting.figures.overlays import ZoneMasks
from prostate_seg.reporting.pages.gallery import GalleryCase, gallery_case, worst_median_best
from prostate_seg.reporting.pages.model_card import render_model_card
from prostate_seg.reporting.pages.report_page import render_report
from prostate_seg.reporting.pages.report_tables import ReportData, all_tables
from prostate_seg.stages.compare import load_result
from prostate_seg.steps.ancestor_gate import ancestors_in
from prostate_seg.steps.dataset import reference_regions

log = logging.getLogger(__name__)

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


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write report/ (or report_external/): report.html, model_card.md and a CSV file per table."""
    external = cfg.evaluate.external_root
    evaluation = workspace.evaluation if external is None else workspace.external_evaluation
    target = workspace.report if external is None else workspace.external_report
    originals = workspace.data if external is None else Path(external)
    data = load_report_data(cfg, workspace, evaluation)
    tables = all_tables(data)
    labels = data.summary.get("labels", {})
    regions: Regions = {WHOLE_GLAND: cfg.data.whole_gland_labels}
    if labels and len(cfg.target.regions) > 1:
        regions = reference_regions(cfg, workspace)
    gallery = load_gallery(
        cfg, data.cases, originals=originals, masks=evaluation / "masks", regions=regions, labels=labels
    )
    elsewhere = load_elsewhere(cfg, workspace, data)
    if elsewhere is not None:
        tables["expected_elsewhere"] = elsewhere.rows
    with atomic_folder(target) as folder:
        page = render_report(data, tables=tables, gallery=gallery, elsewhere=elsewhere)
        write_text(folder / "report.html", page)
        write_text(folder / "model_card.md", render_model_card(data, subgroups=tables["subgroups"]))
        for name, table in tables.items():
            write_csv(folder / f"{name}.csv", table, float_format="%.6g")
    log.info("open %s", target / "report.html")
    inputs = [originals, workspace.preprocess, workspace.kfold_json, workspace.model, evaluation]
    if data.trust is not None and data.trust.is_of_folds:
        inputs.append(workspace.evaluation)
    return StageResult(
        inputs=[path for path in inputs if path.exists()],
        outputs=[target],
        reports=[target / "report.html", target / "model_card.md"],
        description=f"{summary_markdown(data.summary)}  \nReport: {target / 'report.html'}, and the artifacts of `report`.",
    )


def load_report_data(cfg: Config, workspace: Workspace, evaluation: Path) -> ReportData:
    """Read an evaluation of the present version and, as far as the workspace has it, the provenance of its results."""
    cases_csv, slices_csv, metrics_json = (evaluation / name for name in ("cases.csv", "slices.csv", "metrics.json"))
    for path in (cases_csv, slices_csv, metrics_json):
        if not path.is_file():
            raise InputError(f"{path} is absent: run stage=evaluate first, with the same evaluate.external_root")
    columns = pd.read_csv(cases_csv, nrows=0).columns
    if missing := ", ".join(name for name in CASE_METRICS if name not in columns):
        raise InputError(f"{cases_csv} has no {missing}: an older version wrote it\nRun stage=evaluate again.")
    cases = _read_table(cases_csv, numeric=CASE_METRICS)
    dataset, quality = workspace.dataset_csv, workspace.preprocess / "reference_quality.csv"
    sizes = ("num_slices", "spacing_y_mm", "spacing_z_mm", "gland_volume_ml")
    preprocess_log = workspace.preprocess / "preprocess_log.json"
    trained = [path for path in workspace.model.glob("fold*") if path.is_dir()]
    trained.sort(key=lambda path: (len(path.name), path.name))  # fold10 after fold9
    records, settings = _read_records(workspace, evaluation, trained)
    stress = stress_of(workspace, workspace.model)
    summary, is_external = read_json(metrics_json), evaluation == workspace.external_evaluation
    cases_of = by_region(cases.assign(missed_gland=cases["missed_gland"] == "True"))
    return ReportData(
        cases=cases_of.pop(WHOLE_GLAND),
        zones=cases_of,
        slices=by_region(_read_table(slices_csv, numeric=("position", "dice")))[WHOLE_GLAND],
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


def load_elsewhere(cfg: Config, workspace: Workspace, data: ReportData) -> Elsewhere | None:
    """Return the results of unseen groups if the folds are groups, beside those of report.mixed_folds."""
    how = read_json(workspace.kfold_json)["how"] if workspace.kfold_json.is_file() else {}
    is_by_group = how.get("strategy") == "groups" and not data.is_external
    if not is_by_group:
        if cfg.report.mixed_folds is not None:
            raise InputError(
                "report.mixed_folds: goes with an evaluation of fold=groups, and kfold.json has other folds\n"
                "Leave it out, or run prepare, train and evaluate with fold=groups fold.column=COLUMN first."
            )
        return None
    load = partial(load_result, setting="report.mixed_folds", cfg=cfg, workspace=workspace)
    return expected_elsewhere(
        load(str(workspace.evaluation)),
        column=how["column"],
        mixed=None if cfg.report.mixed_folds is None else load(cfg.report.mixed_folds),
        num_bootstrap=data.num_bootstrap,
        seed=data.seed,
    )


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


def load_gallery(
    cfg: Config,
    cases: pd.DataFrame,
    *,
    originals: Path,
    masks: Path,
    regions: Regions,
    labels: Mapping[str, Sequence[int]],
) -> list[GalleryCase]:
    """Return the worst, the median and the best case; without slices if the original files are missing or have changed.

    `regions` has the labels of each region in the reference masks, `labels` those of the zones in the predicted ones.
    """
    try:
        found, _ = discover_cases(originals, patient_pattern=cfg.data.patient_pattern, exclude=())
    except InputError as error:
        log.warning("the gallery has no pictures: %s", error)
        found = []
    files = {case.case_id: case for case in found}
    rows, gallery = cases.to_dict("index"), []
    for rank, index in worst_median_best(cases).items():
        row = rows[index]
        case_id, metrics = str(row["case_id"]), {name: float(row[name]) for name in CASE_METRICS}
        try:
            loaded = _load_original(
                files.get(case_id), md5s=(row["image_md5"], row["mask_md5"]), labels=regions[WHOLE_GLAND]
            )
            reference = whole_gland(loaded.mask.array, labels=regions[WHOLE_GLAND])
            label_map = read_volume(masks / str(row["fold"]) / f"{case_id}.nii.gz").array
            predicted = label_map > 0
            if predicted.shape != reference.shape:
                raise InputError("its predicted mask is on another grid.")
        except InputError as error:
            gallery.append(GalleryCase(rank=rank, case_id=case_id, metrics=metrics, missing=str(error)))
            continue
        image, spacing_mm = loaded.image.array, loaded.image.geometry.spacing_mm
        pictures = {"image": image, "reference": reference, "predicted": predicted}
        zones = [
            ZoneMasks(
                name=name,
                predicted=whole_gland(label_map, labels=labels[name]),
                reference=whole_gland(loaded.mask.array, labels=of_zone),
            )
            for name, of_zone in regions.items()
            if name in labels
        ]
        gallery.append(gallery_case(rank, case_id, metrics, **pictures, zones=zones, spacing_mm=spacing_mm))
    return gallery


def _load_original(case: Case | None, *, md5s: tuple[str, str], labels: Sequence[int] | None) -> LoadedCase:
    """Return a case as it was evaluated; raise an InputError if its files are missing, have changed or cannot be used."""
    if case is None or case.mask is None:
        raise InputError("its original image or mask is missing.")
    if (content_md5(case.image), content_md5(case.mask)) != md5s:
        raise InputError("its image or mask has changed since the evaluation.")
    loaded, quality = load_case(case, labels=labels)
    if loaded is None:
        raise InputError("; ".join(finding.message for finding in quality.findings))
    return loaded


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
