"""Stage evaluate: segment the original images of the test cases, and measure the masks on the images' own grid.

It has no objective, so that no sweep chooses a setting by the test cases.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder, write_csv, write_json
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.dataset import CaseRecord, read_thumbnails
from prostate_seg.data.folds import Fold
from prostate_seg.data.label_names import require_gland_names
from prostate_seg.data.leak_gate import OVERRULE, Check, find_leaks, fingerprints_of, listing
from prostate_seg.data.loading import LoadedCase, load_case, refuse_or_exclude
from prostate_seg.imaging.image_io import content_md5, read_volume, write_volume
from prostate_seg.imaging.quality import Finding, whole_gland
from prostate_seg.reporting.evaluation_tables import (
    CaseResult,
    cases_table,
    flat_summary,
    slices_table,
    summarise_folds,
    summary_lines,
)
from prostate_seg.reporting.overlays import overlay_figure, overlay_title
from prostate_seg.reporting.plots import case_metrics_figure, save_png
from prostate_seg.segmentation.devices import choose_device
from prostate_seg.segmentation.inference.inference import Predictor, segment
from prostate_seg.segmentation.metrics import case_metrics, slice_counts
from prostate_seg.segmentation.networks.storage import load_network, load_recipe
from prostate_seg.stages.common import (
    checked_dataset,
    checked_folds,
    identity_of_files,
    log_overruled,
    not_duplicates,
    preprocess_settings,
)

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write evaluation/ (or evaluation_external/): cases.csv, slices.csv, metrics.json, summary.json, masks and overlays."""
    dataset = checked_dataset(cfg, workspace)
    folds, verdict = checked_folds(cfg, workspace, dataset)
    external = cfg.evaluate.external_root
    target = workspace.evaluation if external is None else workspace.external_evaluation
    with atomic_folder(target) as folder:
        if external is None:
            scored = score_test_cases(cfg, workspace, folder, folds, dataset)
        else:
            scored = score_external_cases(cfg, workspace, folder, Path(external), folds, dataset)
        oracle_crop = preprocess_settings(cfg).crop == "mask"
        summary = summarise_folds(
            scored, oracle_crop=oracle_crop, num_bootstrap=cfg.evaluate.num_bootstrap, seed=cfg.seed
        )
        summary["leak_gate"] = verdict.as_dict()
        table = cases_table(scored, oracle_crop=oracle_crop)
        write_csv(folder / "cases.csv", table)
        write_csv(folder / "slices.csv", slices_table(scored), float_format="%.6g")
        write_json(folder / "metrics.json", summary)
        write_json(folder / "summary.json", flat_summary(summary))
        save_png(folder / "cases.png", case_metrics_figure(table))
        _draw_extremes(folder, scored, cfg)
    for line in summary_lines(summary):
        log.info("%s", line)
    log.info("tables, masks and overlays are in %s", target)
    return StageResult(
        inputs=[
            workspace.data if external is None else Path(external),
            workspace.preprocess,
            workspace.kfold_json,
            workspace.model,
        ],
        outputs=[target],
        metrics={f"test/{name}": mean for name, mean in flat_summary(summary)["test"].items()},
        figures=[target / "cases.png", *sorted((target / "overlays").glob("*.png"))],
        tables=[target / "cases.csv", target / "slices.csv", target / "metrics.json"],
        tags={"leak_gate": verdict.text},
    )


def score_test_cases(
    cfg: Config, workspace: Workspace, folder: Path, folds: dict[int, Fold], dataset: dict[str, CaseRecord]
) -> list[CaseResult]:
    """Score each fold's network on its own test cases."""
    if not any(fold.test for fold in folds.values()):
        raise InputError(
            "there are no test cases: fold=all trains on all but val\n"
            "Use evaluate.external_root=DIR with other cases, or fold=kfold."
        )
    scored = []
    for index, fold in folds.items():
        predictor = load_predictor(cfg, workspace, {index: fold})
        cases = [_original(dataset[case_id], workspace.data) for case_id in fold.test]
        _require_unchanged(cases, dataset)
        work = partial(score_case, cfg=cfg, predictor=predictor, folder=folder, fold=f"fold{index}")
        outcomes = map_cases(work, cases, num_workers=cfg.machine.num_workers, label=f"evaluate fold {index}")
        for one, findings in outcomes:
            assert one is not None, findings  # the same files passed the same checks in stage=preprocess
            scored.append(one)
    return scored


def score_external_cases(
    cfg: Config,
    workspace: Workspace,
    folder: Path,
    root: Path,
    folds: dict[int, Fold],
    dataset: dict[str, CaseRecord],
) -> list[CaseResult]:
    """Score the ensemble of the trained folds on the cases of another folder."""
    cases, findings = discover_cases(root, patient_pattern=cfg.data.patient_pattern, exclude=cfg.data.exclude)
    require_gland_names(root, labels=cfg.data.whole_gland_labels)
    _require_unseen(cfg, workspace, cases, dataset)
    predictor = load_predictor(cfg, workspace, folds)
    work = partial(score_case, cfg=cfg, predictor=predictor, folder=folder, fold="ensemble")
    outcomes = map_cases(work, cases, num_workers=cfg.machine.num_workers, label="evaluate")
    scored = [one for one, _ in outcomes if one is not None]
    findings = [finding for finding in findings if finding.check != "unknown_exclude"]  # may name a training case
    findings += [finding for _, found in outcomes for finding in found]
    exclude = cfg.data.on_bad_case == "exclude"
    refuse_or_exclude(findings, num_usable=len(scored), exclude=exclude)
    return scored


def load_predictor(cfg: Config, workspace: Workspace, folds: dict[int, Fold]) -> Predictor:
    """Load the networks of some folds after checking that they were trained on these folds and this preprocessing.

    Raises:
        InputError: If a fold is not trained, or was trained on something else.
    """
    device = choose_device(cfg.machine.device)
    networks = []
    for index, fold in folds.items():
        path = workspace.fold(index)
        recipe = load_recipe(path)
        if (recipe.train_ids, recipe.val_ids) != (fold.train, fold.val):
            raise InputError(f"{path} was trained on other cases than kfold.json now lists: run stage=train again")
        if recipe.preprocess != preprocess_settings(cfg):
            raise InputError(f"{path} was trained on other preprocessing than this run asks for: run stage=train again")
        networks.append(load_network(path, recipe=recipe, device=device))
    return Predictor(
        networks=networks,
        model=recipe.model,
        preprocess=recipe.preprocess,
        zscore=recipe.zscore,
        device=device,
        precision=cfg.train.precision,
        tta=cfg.evaluate.tta,
    )


def score_case(
    case: Case, *, cfg: Config, predictor: Predictor, folder: Path, fold: str
) -> tuple[CaseResult | None, list[Finding]]:
    """Segment one original image, write the mask on its grid and measure it; a bad case gives None and the reasons."""
    loaded, quality = load_case(case, labels=cfg.data.whole_gland_labels)
    if loaded is None:
        return None, quality.findings
    assert case.mask is not None
    reference = whole_gland(loaded.mask.array, labels=cfg.data.whole_gland_labels)
    predicted = segment(
        loaded.image,
        loaded.mask if predictor.preprocess.crop == "mask" else None,
        predictor=predictor,
        threshold=cfg.evaluate.threshold,
        largest_component=cfg.evaluate.largest_component,
    ).mask
    write_volume(_mask_path(folder, fold, case.case_id), loaded.image.with_mask(predicted))
    return CaseResult(
        fold=fold,
        case=case,
        image_md5=content_md5(case.image),
        mask_md5=content_md5(case.mask),
        metrics=case_metrics(reference, predicted, spacing_mm=loaded.image.geometry.spacing_mm),
        counts=slice_counts(reference, predicted),
    ), quality.findings


def _original(row: CaseRecord, data: Path) -> Case:
    return Case(
        case_id=row.case_id,
        patient_id=row.patient_id,
        study_id=row.study_id,
        image=data / row.image,
        mask=data / row.mask,
        attributes=row.attributes,
    )


def _require_unchanged(cases: Sequence[Case], dataset: dict[str, CaseRecord]) -> None:
    """Check that the originals are still those that preprocessing and the leak gate saw."""
    for case in cases:
        assert case.mask is not None
        for path, md5 in ((case.image, dataset[case.case_id].image_md5), (case.mask, dataset[case.case_id].mask_md5)):
            if not path.exists():
                raise InputError(
                    f"{case.case_id}: {path} is gone since stage=preprocess; put it back, or set data.root"
                )
            if content_md5(path) != md5:
                raise InputError(f"{case.case_id}: {path} has changed since stage=preprocess: run the pipeline again")


def _require_unseen(cfg: Config, workspace: Workspace, cases: Sequence[Case], dataset: dict[str, CaseRecord]) -> None:
    """Check that no external image is, or nearly is, one that the networks were trained on.

    Patients of two data sets can have the same number, so that a shared patient id is only a warning.
    """
    trained = fingerprints_of(dataset, read_thumbnails(workspace.thumbnails_npy, case_ids=dataset))
    read = map_cases(identity_of_files, cases, num_workers=cfg.machine.num_workers, label="leak gate")
    external = {case.case_id: identity for case, identity in zip(cases, read, strict=True)}
    shared = sorted({one.patient_id for one in trained.values()} & {one.patient_id for one in external.values()})
    if shared:
        log.warning("patient ids of both data sets: %s; exclude them if they are the same people", ", ".join(shared))
    of_external = f" of {cfg.evaluate.external_root}"
    renamed = {
        f"{case_id}{suffix}": replace(identity, patient_id=f"{case_id}{suffix}", oracle_crop=None)
        for group, suffix in ((trained, ""), (external, of_external))
        for case_id, identity in group.items()
    }
    fold = Fold(train=sorted(trained), val=[], test=sorted(set(renamed) - set(trained)))
    pairs = {
        frozenset((one, f"{other}{of_external}")): reason
        for pair, reason in not_duplicates(cfg).items()
        for one, other in permutations(pair, 2)
    }
    verdict = find_leaks([fold], identities=renamed, not_duplicates=pairs)
    log_overruled(verdict, {}, renamed)
    leaks = verdict.leaks
    if leaks:
        raise InputError(
            f"{len({leak.second for leak in leaks})} of {len(cases)} external images are in the data set of the trained folds:"
            f"\n  {listing(leaks)}\nList them under data.exclude."
            + (f"\n{OVERRULE}" if any(leak.check is Check.picture for leak in leaks) else "")
        )


def _mask_path(folder: Path, fold: str, case_id: str) -> Path:
    return folder / "masks" / fold / f"{case_id}.nii.gz"


def _draw_extremes(folder: Path, scored: Sequence[CaseResult], cfg: Config) -> None:
    """Draw the worst, the median and the best case."""
    ordered = sorted(scored, key=lambda one: one.metrics.dice)
    for name, one in {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}.items():
        loaded, _ = load_case(one.case, labels=cfg.data.whole_gland_labels)
        assert loaded is not None
        _draw_case(folder, name, one, loaded, cfg)


def _draw_case(folder: Path, name: str, one: CaseResult, loaded: LoadedCase, cfg: Config) -> None:
    predicted = read_volume(_mask_path(folder, one.fold, one.case.case_id))
    figure = overlay_figure(
        loaded.image.array,
        predicted.array > 0,
        reference=whole_gland(loaded.mask.array, labels=cfg.data.whole_gland_labels),
        spacing_mm=loaded.image.geometry.spacing_mm,
        title=f"{name}: {overlay_title(one.case.case_id, one.metrics)}",
    )
    save_png(folder / "overlays" / f"{name}.png", figure)
