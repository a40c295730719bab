"""Stage report: report.html, model_card.md and the tables behind the plots, from an evaluation and its provenance."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder, read_json, write_csv, write_text
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.loading import LoadedCase, load_case
from prostate_seg.imaging.image_io import content_md5, read_volume
from prostate_seg.imaging.regions import Regions, region_masks
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.comparison.unseen_groups import UnseenGroups, summarise_unseen_groups
from prostate_seg.reporting.evaluation.tables import CASE_METRICS, summary_markdown
from prostate_seg.reporting.figures.overlays import RegionMasks
from prostate_seg.reporting.pages.gallery import gallery_case, worst_median_best
from prostate_seg.reporting.pages.model_card import render_model_card
from prostate_seg.reporting.pages.report_page import render_report
from prostate_seg.reporting.pages.report_tables import ReportData, all_tables
from prostate_seg.steps.dataset import reference_regions
from prostate_seg.steps.report_data import load_report_data
from prostate_seg.steps.results import load_result, tree_of_runs

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write report/ (or report_external/): report.html, model_card.md and a CSV file per table."""
    external = cfg.evaluate.external_root
    evaluation, target, originals = workspace.evaluation, workspace.report, workspace.data
    if external is not None:
        evaluation, target, originals = workspace.external_evaluation, workspace.external_report, Path(external)
    data = load_report_data(cfg, workspace, evaluation)
    tables = all_tables(data)
    gallery = load_gallery(cfg, workspace, data, originals=originals, masks=evaluation / "masks")
    unseen = load_unseen_groups(cfg, workspace, data)
    if unseen is not None:
        tables["expected_elsewhere"] = unseen.rows
    with atomic_folder(target) as folder:
        page = render_report(data, tables=tables, gallery=gallery, unseen=unseen)
        write_text(folder / "report.html", page)
        write_text(folder / "model_card.md", render_model_card(data, subgroups=tables["subgroups"]))
        for name, table in tables.items():
            write_csv(folder / f"{name}.csv", table, float_format="%.6g")
    log.info("open %s", target / "report.html")
    inputs = [originals, workspace.preprocess, workspace.kfold_json, workspace.model, evaluation]
    if data.trust is not None and data.trust.is_of_folds:
        inputs.append(workspace.evaluation)
    if data.stress is not None:
        inputs.append(workspace.stress)
    if cfg.report.mixed_folds is not None:  # the id of a run is no path
        inputs.append(Path(cfg.report.mixed_folds))
    return StageResult(
        inputs=[path for path in inputs if path.exists()],
        outputs=[target],
        reports=[target / "report.html", target / "model_card.md"],
        description=f"{summary_markdown(data.summary)}  \nReport: {target / 'report.html'}, and the artifacts of `report`.",
    )


def load_unseen_groups(cfg: Config, workspace: Workspace, data: ReportData) -> UnseenGroups | None:
    """Return the results of unseen groups if the folds are groups, beside those of report.mixed_folds."""
    how = read_json(workspace.kfold_json)["how"] if workspace.kfold_json.is_file() else {}
    mixed = cfg.report.mixed_folds
    if how.get("strategy") != "groups" or data.is_external:
        if mixed is not None:
            found = "evaluate.external_root names other cases" if data.is_external else "kfold.json has other folds"
            raise InputError(
                f"report.mixed_folds: goes with an evaluation of fold=groups, and {found}; is {mixed}\n"
                "Leave it out, or run prepare, train and evaluate with fold=groups fold.column=COLUMN first."
            )
        return None
    load = partial(load_result, setting="report.mixed_folds", tree=tree_of_runs([mixed or ""], cfg, workspace))
    return summarise_unseen_groups(
        load(str(workspace.evaluation)),
        column=how["column"],
        mixed=None if mixed is None else load(mixed),
        num_bootstrap=data.num_bootstrap,
        seed=data.seed,
    )


def load_gallery(
    cfg: Config, workspace: Workspace, data: ReportData, *, originals: Path, masks: Path
) -> list[dict[str, Any]]:
    """Return the worst, the median and the best case, each with its `gallery_case`, or the reason why it is `missing`."""
    labels: Mapping[str, Sequence[int]] = data.summary.get("labels", {})  # of the zones in predicted masks
    regions: Regions = {WHOLE_GLAND: cfg.data.whole_gland_labels}
    if labels and len(cfg.target.regions) > 1:
        regions = reference_regions(cfg, workspace)
    try:
        cases_there, _ = discover_cases(originals, patient_pattern=cfg.data.patient_pattern, exclude=())
    except InputError as error:
        log.warning("the gallery has no pictures: %s", error)
        cases_there = []
    files = {case.case_id: case for case in cases_there}
    true: Regions = {name: regions[name] for name in regions if name in (WHOLE_GLAND, *labels)}
    predicted: Regions = {name: tuple(labels[name]) if name in labels else None for name in true}
    rows, gallery = data.cases.to_dict("index"), []
    for rank, index in worst_median_best(data.cases).items():
        row = rows[index]
        case_id, md5s = str(row["case_id"]), (row["image_md5"], row["mask_md5"])
        case = {"rank": rank, "case_id": case_id, "metrics": {name: float(row[name]) for name in CASE_METRICS}}
        try:
            loaded = _load_original(files.get(case_id), md5s=md5s, labels=regions[WHOLE_GLAND])
            label_map = read_volume(masks / str(row["fold"]) / f"{case_id}.nii.gz").array
            if label_map.shape != loaded.mask.array.shape:
                raise InputError("its predicted mask is on another grid.")
        except InputError as error:
            gallery.append({**case, "missing": str(error)})
            continue
        pairs = zip(true, region_masks(label_map, predicted), region_masks(loaded.mask.array, true), strict=True)
        shown = [RegionMasks(name=name, predicted=mask, reference=reference) for name, mask, reference in pairs]
        slices = gallery_case(loaded.image.array, shown, spacing_mm=loaded.image.geometry.spacing_mm)
        gallery.append({**case, "missing": "", **slices})
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
