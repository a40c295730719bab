"""Stage evaluate: segment the original test images, and compare the masks with the references on the images' own grid.

The stage returns no objective, so that no sweep selects a setting on test cases.
"""

import logging
from collections.abc import Callable, Sequence
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
from prostate_seg.data.loading import load_case, read_mask, refuse_or_exclude
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
from prostate_seg.segmentation.metrics import case_metrics
from prostate_seg.segmentation.networks.storage import load_network, load_recipe
from prostate_seg.segmentation.overlap import slice_counts
from prostate_seg.stages.common import (
    checked_dataset,
    checked_folds,
    fingerprint_of_files,
    not_duplicates,
    overruled_lines,
    preprocess_settings,
)

log = logging.getLogger(__name__)

Md5s = tuple[str, str]
"""Hashes of image and mask."""
Outcome = tuple[CaseResult | None, list[Finding]]
"""Result of a case, None if it has errors, and the findings of its checks."""


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write evaluation/ (or evaluation_external/): cases.csv, slices.csv, metrics.json, summary.json, masks and overlays."""
    dataset = checked_dataset(cfg, workspace)
    folds, verdict = checked_folds(cfg, workspace, dataset)
    external = cfg.evaluate.external_root
    target = workspace.evaluation if external is None else workspace.external_evaluation
    oracle_crop = preprocess_settings(cfg).crop == "mask"
    with atomic_folder(target) as folder:
        if external is None:
            results = evaluate_test_cases(cfg, workspace, folder, folds, dataset)
        else:
            results = evaluate_external_cases(cfg, workspace, folder, Path(external), folds, dataset)
        summary = summarise_folds(
            results, oracle_crop=oracle_crop, num_bootstrap=cfg.evaluate.num_bootstrap, seed=cfg.seed
        )
        summary["leak_gate"] = verdict
        table = cases_table(results, oracle_crop=oracle_crop)
        write_csv(folder / "cases.csv", table)
        write_csv(folder / "slices.csv", slices_table(results), float_format="%.6g")
        write_json(folder / "metrics.json", summary)
        write_json(folder / "summary.json", flat_summary(summary))
        save_png(folder / "cases.png", case_metrics_figure(table))
        ordered = sorted(results, key=lambda result: result.metrics.dice)
        for name, result in {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}.items():
            draw_result(folder, name, result, labels=cfg.data.whole_gland_labels)
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
        tags={"leak_gate": verdict["verdict"]},
    )


def evaluate_test_cases(
    cfg: Config, workspace: Workspace, folder: Path, folds: dict[int, Fold], dataset: dict[str, CaseRecord]
) -> list[CaseResult]:
    """Evaluate the network of each fold on the fold's own test cases."""
    if not any(fold.test for fold in folds.values()):
        raise InputError(
            "there are no test cases: fold=all trains on all but val\n"
            "Use evaluate.external_root=DIR with other cases, or fold=kfold."
        )
    results: list[CaseResult] = []
    for index, fold in folds.items():
        predictor = load_predictor(cfg, workspace, {index: fold})
        evaluate = partial(evaluate_case, cfg=cfg, predictor=predictor, folder=folder, fold=f"fold{index}")
        work = partial(evaluate_test_case, data=workspace.data, evaluate=evaluate)
        records = [dataset[case_id] for case_id in fold.test]
        results += map_cases(work, records, num_workers=cfg.machine.num_workers, label=f"evaluate fold {index}")
    return results


def evaluate_test_case(record: CaseRecord, *, data: Path, evaluate: Callable[[Case, Md5s], Outcome]) -> CaseResult:
    """Evaluate one case of the data set.

    Raises:
        InputError: If its files are not those that preprocessing and the leak gate read.
    """
    image, mask = data / record.image, data / record.mask
    for path, md5 in ((image, record.image_md5), (mask, record.mask_md5)):
        if not path.exists():
            raise InputError(f"{record.case_id}: {path} is gone since stage=preprocess; put it back, or set data.root")
        if content_md5(path) != md5:
            raise InputError(f"{record.case_id}: {path} has changed since stage=preprocess: run the pipeline again")
    case = Case(
        case_id=record.case_id,
        patient_id=record.patient_id,
        study_id=record.study_id,
        image=image,
        mask=mask,
        attributes=record.attributes,
    )
    result, findings = evaluate(case, (record.image_md5, record.mask_md5))
    assert result is not None, findings  # the same files passed the same checks in stage=preprocess
    return result


def evaluate_external_cases(
    cfg: Config,
    workspace: Workspace,
    folder: Path,
    root: Path,
    folds: dict[int, Fold],
    dataset: dict[str, CaseRecord],
) -> list[CaseResult]:
    """Evaluate the ensemble of the folds on the cases of another data folder."""
    cases, findings = discover_cases(root, patient_pattern=cfg.data.patient_pattern, exclude=cfg.data.exclude)
    require_gland_names(root, labels=cfg.data.whole_gland_labels)
    md5s = hashes_of_unseen(cfg, workspace, cases, dataset)
    predictor = load_predictor(cfg, workspace, folds)
    evaluate = partial(evaluate_case, cfg=cfg, predictor=predictor, folder=folder, fold="ensemble")
    outcomes = map_cases(
        lambda case: evaluate(case, md5s[case.case_id]), cases, num_workers=cfg.machine.num_workers, label="evaluate"
    )
    results = [result for result, _ in outcomes if result is not None]
    findings = [finding for finding in findings if finding.check != "unknown_exclude"]  # may name a training case
    findings += [finding for _, found in outcomes for finding in found]
    exclude = cfg.data.on_bad_case == "exclude"
    refuse_or_exclude(findings, num_usable=len(results), exclude=exclude)
    return results


def evaluate_case(case: Case, md5s: Md5s, *, cfg: Config, predictor: Predictor, folder: Path, fold: str) -> Outcome:
    """Read, check and segment one original image, write the mask on its grid, and measure it against the reference."""
    labels = cfg.data.whole_gland_labels
    loaded, quality = load_case(case, labels=labels)
    if loaded is None:
        return None, quality.findings
    predicted = segment(
        loaded.image,
        loaded.mask if predictor.preprocess.crop == "mask" else None,
        predictor=predictor,
        threshold=cfg.evaluate.threshold,
        largest_component=cfg.evaluate.largest_component,
    ).mask
    write_volume(_mask_path(folder, fold, case.case_id), loaded.image.with_mask(predicted))
    reference = whole_gland(loaded.mask.array, labels=labels)
    result = CaseResult(
        fold=fold,
        case=case,
        image_md5=md5s[0],
        mask_md5=md5s[1],
        metrics=case_metrics(reference, predicted, spacing_mm=loaded.image.geometry.spacing_mm),
        counts=slice_counts(reference, predicted),
    )
    return result, quality.findings


def draw_result(folder: Path, name: str, result: CaseResult, *, labels: Sequence[int] | None) -> None:
    """Draw the overlay of a case; its files are read again, because the median case is known only after the last one."""
    case = result.case
    assert case.mask is not None
    image = read_volume(case.image)
    figure = overlay_figure(
        image.array,
        read_volume(_mask_path(folder, result.fold, case.case_id)).array > 0,
        reference=whole_gland(read_mask(case.mask).array, labels=labels),
        spacing_mm=image.geometry.spacing_mm,
        title=f"{name}: {overlay_title(case.case_id, result.metrics)}",
    )
    save_png(folder / "overlays" / f"{name}.png", figure)


def _mask_path(folder: Path, fold: str, case_id: str) -> Path:
    return folder / "masks" / fold / f"{case_id}.nii.gz"


def load_predictor(cfg: Config, workspace: Workspace, folds: dict[int, Fold]) -> Predictor:
    """Load the networks of some folds as an ensemble.

    Raises:
        InputError: If a fold is not trained, or was trained on other cases or other preprocessing.
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


def hashes_of_unseen(
    cfg: Config, workspace: Workspace, cases: Sequence[Case], dataset: dict[str, CaseRecord]
) -> dict[str, Md5s]:
    """Compare external images with those of the trained folds, and return the hashes of the external files by case id.

    Raises:
        InputError: If an external image is a duplicate or near-duplicate of one of the data set.
    """
    known = fingerprints_of(dataset, read_thumbnails(workspace.thumbnails_npy, case_ids=dataset))
    read = map_cases(fingerprint_of_files, cases, num_workers=cfg.machine.num_workers, label="leak gate")
    external = {case.case_id: fingerprint for case, fingerprint in zip(cases, read, strict=True)}
    shared = sorted({one.patient_id for one in known.values()} & {one.patient_id for one in external.values()})
    if shared:
        log.warning("patient ids of both data sets: %s; exclude them if they are the same people", ", ".join(shared))
    # Patients of two data sets can have equal ids, so the ids of external cases get a suffix. The oracle crop is reported by
    # the gate of the folds.
    suffix = f" of {cfg.evaluate.external_root}"
    compared = {case_id: replace(fingerprint, oracle_crop=None) for case_id, fingerprint in known.items()}
    for case_id, fingerprint in external.items():
        compared[f"{case_id}{suffix}"] = replace(fingerprint, patient_id=f"{fingerprint.patient_id}{suffix}")
    fold = Fold(train=sorted(known), val=[], test=sorted(set(compared) - set(known)))
    pairs = {
        frozenset((one, f"{other}{suffix}")): reason
        for pair, reason in not_duplicates(cfg).items()
        for one, other in permutations(pair, 2)
    }
    verdict = find_leaks([fold], fingerprints=compared, not_duplicates=pairs)
    for line in overruled_lines(verdict, {}, compared):
        log.warning("%s", line)
    leaks = verdict.leaks
    if leaks:
        raise InputError(
            f"{len({leak.second for leak in leaks})} of {len(cases)} external images are in the data set of the trained folds:"
            f"\n  {listing(leaks)}\nList them under data.exclude."
            + (f"\n{OVERRULE}" if any(leak.check is Check.near_duplicate for leak in leaks) else "")
        )
    return {case_id: (str(one.image_md5), str(one.mask_md5)) for case_id, one in external.items()}
