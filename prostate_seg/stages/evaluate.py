"""Stage evaluate: segment the original test images, and compare the masks with the references on the images' own grid.

The stage returns no objective, so that no sweep selects a setting on test cases. Each image is decoded and hashed once; those
of an external folder are compared with the images of the trained folds before a network segments them.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, permutations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder, md5_of, md5_of_text, write_csv, write_json
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.dataset import CaseRecord, read_thumbnails
from prostate_seg.data.folds import Fold
from prostate_seg.data.label_names import require_gland_names
from prostate_seg.data.leak_gate import OVERRULE, Check, Fingerprint, Leak, find_leaks, fingerprints_of, listing
from prostate_seg.data.lineage import Ancestor, owners, studies_by_name
from prostate_seg.data.loading import LoadedCase, load_case, read_mask, refuse_or_exclude
from prostate_seg.imaging.image_io import content_md5, read_volume, write_volume
from prostate_seg.imaging.quality import Finding
from prostate_seg.imaging.regions import Regions, predicted_labels, region_masks
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.evaluation import tables, trust
from prostate_seg.reporting.evaluation.tables import CaseResult
from prostate_seg.reporting.figures.overlays import ZoneMasks, overlay_figure, overlay_title
from prostate_seg.reporting.figures.plots import case_metrics_figure, save_png
from prostate_seg.segmentation.calibration import bin_logits, count_near_surface
from prostate_seg.segmentation.devices import choose_device
from prostate_seg.segmentation.inference.inference import Predictor, Segmentation, segment
from prostate_seg.segmentation.inference.out_of_distribution import TrainingRanges, merged_ranges
from prostate_seg.segmentation.inference.prediction import features_of, study_properties
from prostate_seg.segmentation.metrics import case_metrics
from prostate_seg.segmentation.networks.storage import WEIGHTS, load_network, load_recipe
from prostate_seg.segmentation.overlap import slice_counts
from prostate_seg.steps import dataset as common
from prostate_seg.steps.ancestor_gate import ancestors_in, pass_ancestor_gate, with_ancestors

log = logging.getLogger(__name__)

Md5s = tuple[str, str]
"""Hashes of image and mask."""
Result = TypeVar("Result")

MAX_VAL_STUDIES = 20
"""Val studies, over all folds, that the temperature is fitted to: hundreds of thousands of voxels for one number."""


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write evaluation/ (or evaluation_external/): tables, metrics.json, summary.json, masks and overlays."""
    dataset = common.checked_dataset(cfg, workspace)
    folds, verdict = common.checked_folds(cfg, workspace, dataset)
    ancestors = {index: ancestors_in(workspace.fold(index)) for index in folds}
    external = None if cfg.evaluate.external_root is None else Path(cfg.evaluate.external_root)
    target = workspace.evaluation if external is None else workspace.external_evaluation
    oracle_crop, regions = cfg.preprocess.crop == "mask", common.reference_regions(cfg, workspace)
    with atomic_folder(target) as folder:
        if external is None:
            verdict = check_test_cases(cfg, workspace, folds, dataset, ancestors, verdict)
            results = evaluate_test_cases(cfg, workspace, folder, folds, dataset, regions=regions)
        else:
            everyone = list(chain.from_iterable(ancestors.values()))
            results = evaluate_external_cases(
                cfg, workspace, folder, external, folds, dataset, everyone, regions=regions
            )
            verdict = with_ancestors(verdict, everyone)
        summary = tables.summarise_folds(
            results, oracle_crop=oracle_crop, num_bootstrap=cfg.evaluate.num_bootstrap, seed=cfg.seed
        )
        summary["leak_gate"] = verdict
        summary["trust"], trusted = write_trust(folder, results, cfg, workspace, folds, dataset, regions=regions)
        if zones := common.preprocess_settings(cfg, workspace).zones:
            summary["labels"] = {name: list(labels) for name, labels in zones.items()}
        flat, table = tables.flat_summary(summary), tables.cases_table(results, oracle_crop=oracle_crop)
        write_csv(folder / "cases.csv", table)
        write_csv(folder / "slices.csv", tables.slices_table(results), float_format="%.6g")
        write_json(folder / "metrics.json", summary)
        write_json(folder / "summary.json", flat)
        predicted = predicted_labels(common.preprocess_settings(cfg, workspace).regions)
        glands = [result for result in results if result.region == WHOLE_GLAND]
        save_png(folder / "cases.png", case_metrics_figure(tables.cases_table(glands, oracle_crop=oracle_crop)))
        ordered = sorted(glands, key=lambda result: result.metrics.dice)
        for name, result in {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}.items():
            draw_result(folder, name, result, regions=regions, predicted_regions=predicted)
    for line in [*tables.summary_lines(summary), *trust.trust_lines(summary["trust"], trusted)]:
        log.info("%s", line)
    log.info("tables, masks and overlays are in %s", target)
    return StageResult(
        inputs=[external or workspace.data, workspace.preprocess, workspace.kfold_json, workspace.model],
        outputs=[target],
        metrics={f"test/{name}": mean for name, mean in flat["test"].items()},
        figures=[target / "cases.png", *sorted((target / "overlays").glob("*.png"))],
        tables=[target / name for name in ("cases.csv", "slices.csv", "metrics.json", "expected_dice.csv")],
        tags={"leak_gate": verdict["verdict"]},
        description=tables.summary_markdown(summary),
    )


def check_test_cases(
    cfg: Config,
    workspace: Workspace,
    folds: Mapping[int, Fold],
    dataset: Mapping[str, CaseRecord],
    ancestors: Mapping[int, Sequence[Ancestor]],
    verdict: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the verdict of the leak gate with that on the ancestors of the networks; refuse test cases they have seen."""
    known = fingerprints_of(dataset, read_thumbnails(workspace.thumbnails_npy, case_ids=dataset))
    tested = {f"fold {index}": (replace(fold, val=[]), ancestors[index]) for index, fold in folds.items()}
    return pass_ancestor_gate(tested, verdict, fingerprints=known, not_duplicates=common.not_duplicates(cfg))


def evaluate_test_cases(
    cfg: Config,
    workspace: Workspace,
    folder: Path,
    folds: dict[int, Fold],
    dataset: dict[str, CaseRecord],
    *,
    regions: Regions,
) -> list[CaseResult]:
    """Evaluate the network of each fold on the fold's own test cases; the results of a case have the order of the regions."""
    if not any(fold.test for fold in folds.values()):
        raise InputError(
            "there are no test cases: fold=all trains on all but val\n"
            "Use evaluate.external_root=DIR with other cases, or fold=kfold."
        )
    results: list[CaseResult] = []
    for index, fold in folds.items():
        predictor = load_predictor(cfg, workspace, {index: fold})
        evaluate = partial(
            evaluate_case,
            cfg=cfg,
            predictor=predictor,
            ranges=ranges_of(workspace, {index: fold}),
            folder=folder,
            fold=f"fold{index}",
            regions=regions,
        )
        work = partial(apply_to_case, labels=regions[WHOLE_GLAND], data=workspace.data, function=evaluate)
        records = [dataset[case_id] for case_id in fold.test]
        found = map_cases(work, records, num_workers=cfg.machine.num_workers, label=f"evaluate fold {index}")
        results += chain.from_iterable(found)
    return results


def apply_to_case(
    record: CaseRecord,
    *,
    labels: Sequence[int] | None,
    data: Path,
    function: Callable[[Case, LoadedCase, Md5s], Result],
) -> Result:
    """Apply a function to one case of the data set, whose files must be those that preprocessing and the leak gate read."""
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
    loaded, quality = load_case(case, labels=labels)
    assert loaded is not None, quality.findings  # the same files passed the same checks in stage=preprocess
    return function(case, loaded, (record.image_md5, record.mask_md5))


def write_trust(
    folder: Path,
    results: Sequence[CaseResult],
    cfg: Config,
    workspace: Workspace,
    folds: dict[int, Fold],
    dataset: dict[str, CaseRecord],
    *,
    regions: Regions,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Write expected_dice.csv and calibration.csv; return the part of metrics.json and the first table."""
    is_external = cfg.evaluate.external_root is not None
    counts = {} if is_external else count_val_voxels(cfg, workspace, folds, dataset, regions=regions)
    counts |= trust.voxels_of_regions(results)
    table = trust.expected_dice_table(results, coverage=cfg.evaluate.coverage)
    write_csv(folder / "expected_dice.csv", table, float_format="%.6g")
    write_csv(folder / "calibration.csv", trust.calibration_table(counts))
    oracle_crop = cfg.preprocess.crop == "mask"
    return {
        "networks_md5": networks_md5(cfg, workspace, folds),
        **trust.fitted_expected_dice(table, coverage=cfg.evaluate.coverage, oracle_crop=oracle_crop),
        "calibration": trust.fitted_temperatures(counts),
    }, table


def count_val_voxels(
    cfg: Config, workspace: Workspace, folds: dict[int, Fold], dataset: dict[str, CaseRecord], *, regions: Regions
) -> dict[tuple[str, str], np.ndarray]:
    """Count the voxels near the surface of each region by logit, over val studies of each fold segmented by its network."""
    counts = {(region, "val"): np.zeros((2, len(bin_logits())), dtype=np.int64) for region in regions}
    for index, fold in folds.items():
        predictor = load_predictor(cfg, workspace, {index: fold})
        count = partial(_count_val_study, cfg=cfg, predictor=predictor, regions=regions)
        work = partial(apply_to_case, labels=regions[WHOLE_GLAND], data=workspace.data, function=count)
        present = [dataset[case_id] for case_id in fold.val if (workspace.data / dataset[case_id].image).exists()]
        chosen = present[:: max(1, math.ceil(len(present) * len(folds) / MAX_VAL_STUDIES))]
        found = map_cases(work, chosen, num_workers=cfg.machine.num_workers, label=f"calibrate fold {index}")
        for key, *of_studies in zip(counts, *found, strict=True):
            counts[key] = sum(of_studies, counts[key])
    return counts


def _count_val_study(
    _case: Case, loaded: LoadedCase, _md5s: Md5s, *, cfg: Config, predictor: Predictor, regions: Regions
) -> list[np.ndarray]:
    return voxels_near_surface(loaded, segment_case(loaded, cfg=cfg, predictor=predictor), predictor, regions)


def evaluate_external_cases(
    cfg: Config,
    workspace: Workspace,
    folder: Path,
    root: Path,
    folds: dict[int, Fold],
    dataset: dict[str, CaseRecord],
    ancestors: Sequence[Ancestor],
    *,
    regions: Regions,
) -> list[CaseResult]:
    """Evaluate the ensemble of the folds on the cases of another data folder; refuse cases that it or its ancestors have seen.

    Copied files are refused before an image is read. Near-duplicates are known only once the image is decoded: from the first
    one on, no network runs, and the remaining images are compared only, so that the error lists all of them.
    """
    cases, findings = discover_cases(root, patient_pattern=cfg.data.patient_pattern, exclude=cfg.data.exclude)
    require_gland_names(root, labels=cfg.data.whole_gland_labels, given=cfg.evaluate.external_labels)
    known = fingerprints_of(dataset, read_thumbnails(workspace.thumbnails_npy, case_ids=dataset))
    warn_of_shared_patients(cases, known)
    known |= studies_by_name(study for ancestor in ancestors for study in ancestor.studies)
    compare = partial(leaks_of_external, cfg=cfg, known=known)
    hashed = map_cases(hash_files, cases, num_workers=cfg.machine.num_workers, label="hash")
    external = {case.case_id: fingerprint for case, fingerprint in zip(cases, hashed, strict=True)}
    refuse_leaks(compare(external), ancestors, num_cases=len(cases))
    predictor, ranges = load_predictor(cfg, workspace, folds), ranges_of(workspace, folds)
    leaks: list[Leak] = []
    allow_others = len(regions) == 1 or cfg.data.whole_gland_labels is not None

    def evaluate(case: Case) -> tuple[list[CaseResult], list[Finding]]:
        loaded, quality = load_case(case, labels=regions[WHOLE_GLAND], allow_others=allow_others)
        if loaded is None:
            return [], quality.findings
        fingerprint = common.with_voxels(external[case.case_id], loaded.image)
        leaks.extend(compare({case.case_id: fingerprint}))
        if leaks:
            return [], quality.findings
        md5s = str(fingerprint.image_md5), str(fingerprint.mask_md5)
        measure = partial(evaluate_case, cfg=cfg, predictor=predictor, ranges=ranges, folder=folder, fold="ensemble")
        return measure(case, loaded, md5s, regions=regions), quality.findings

    outcomes = map_cases(evaluate, cases, num_workers=cfg.machine.num_workers, label="evaluate")
    refuse_leaks(leaks, ancestors, num_cases=len(cases))
    results = [result for of_case, _ in outcomes for result in of_case]
    findings = [finding for finding in findings if finding.check != "unknown_exclude"]  # may name a training case
    findings += [finding for _, found in outcomes for finding in found]
    refuse_or_exclude(
        findings, num_usable=sum(bool(of_case) for of_case, _ in outcomes), exclude=cfg.data.on_bad_case == "exclude"
    )
    return results


def evaluate_case(
    case: Case,
    loaded: LoadedCase,
    md5s: Md5s,
    *,
    cfg: Config,
    predictor: Predictor,
    ranges: TrainingRanges,
    folder: Path,
    fold: str,
    regions: Regions,
) -> list[CaseResult]:
    """Segment one original image, write the label map on its grid, and measure each region against the reference.

    The label map has the values of the data set that the networks were trained on, the reference those in `regions`.
    """
    found, spacing_mm = segment_case(loaded, cfg=cfg, predictor=predictor), loaded.image.geometry.spacing_mm
    write_volume(_mask_path(folder, fold, case.case_id), loaded.image.with_mask(found.label_map))
    features = features_of(found, study_properties(loaded.image, found), ranges=ranges)
    predictions = region_masks(found.label_map, predicted_labels(predictor.preprocess.regions))
    references = region_masks(loaded.mask.array, regions)
    voxels = voxels_near_surface(loaded, found, predictor, regions)
    results = []
    for region, mask, reference, of_region in zip(regions, predictions, references, voxels, strict=True):
        counts = slice_counts(reference, mask)
        result = CaseResult(
            fold=fold,
            case=case,
            image_md5=md5s[0],
            mask_md5=md5s[1],
            metrics=case_metrics(reference, mask, spacing_mm=spacing_mm, counts=counts),
            counts=counts,
            region=region,
            features=features,
            voxels=of_region,
        )
        results.append(result)
    return results


def segment_case(loaded: LoadedCase, *, cfg: Config, predictor: Predictor) -> Segmentation:
    """Segment a case as the settings of the evaluation say."""
    return segment(
        loaded.image,
        loaded.mask if predictor.preprocess.crop == "mask" else None,
        predictor=predictor,
        threshold=cfg.evaluate.threshold,
        largest_component=cfg.evaluate.largest_component,
    )


def voxels_near_surface(
    loaded: LoadedCase, found: Segmentation, predictor: Predictor, regions: Regions
) -> list[np.ndarray]:
    """Count the voxels near the surface of each region by label and logit."""
    masks = region_masks(found.label_map, predicted_labels(predictor.preprocess.regions))
    of_regions = zip(region_masks(loaded.mask.array, regions), masks, found.probability, strict=True)
    return [count_near_surface(*arrays, spacing_mm=loaded.image.geometry.spacing_mm) for arrays in of_regions]


def draw_result(folder: Path, name: str, result: CaseResult, *, regions: Regions, predicted_regions: Regions) -> None:
    """Draw the overlay of a case; its files are read again, because the median case is known only after the last one.

    The labels of the regions are those of the reference and of the predicted label map.
    """
    case = result.case
    assert case.mask is not None
    image, label_map = read_volume(case.image), read_volume(_mask_path(folder, result.fold, case.case_id))
    references = region_masks(read_mask(case.mask).array, regions)
    pairs = zip(regions, region_masks(label_map.array, predicted_regions), references, strict=True)
    gland, *zones = (ZoneMasks(name=name, predicted=mask, reference=reference) for name, mask, reference in pairs)
    figure = overlay_figure(
        image.array,
        gland.predicted,
        reference=gland.reference,
        zones=zones,
        spacing_mm=image.geometry.spacing_mm,
        title=f"{name}: {overlay_title(case.case_id, result.metrics)}",
    )
    save_png(folder / "overlays" / f"{name}.png", figure)


def _mask_path(folder: Path, fold: str, case_id: str) -> Path:
    return folder / "masks" / fold / f"{case_id}.nii.gz"


def load_predictor(cfg: Config, workspace: Workspace, folds: dict[int, Fold]) -> Predictor:
    """Load the networks of some folds, which must be trained on the present cases and preprocessing, as an ensemble."""
    device, networks = choose_device(cfg.machine.device), []
    for index, fold in folds.items():
        path = workspace.fold(index)
        recipe = load_recipe(path)
        # A training may have taken some of the training cases only (fold.max_train_cases).
        if recipe.val_ids != fold.val or not set(recipe.train_ids) <= set(fold.train):
            raise InputError(f"{path} was trained on other cases than kfold.json now lists: run stage=train again")
        if recipe.preprocess != common.preprocess_settings(cfg, workspace):
            raise InputError(f"{path} was trained on other preprocessing than this run asks for: run stage=train again")
        networks.append(load_network(path, recipe=recipe, device=device))
    return recipe.predictor(networks, device=device, precision=cfg.train.precision, tta=cfg.evaluate.tta)


def ranges_of(workspace: Workspace, folds: Iterable[int]) -> TrainingRanges:
    """Return the training ranges of the networks of some folds together."""
    return merged_ranges([load_recipe(workspace.fold(index)).ranges for index in folds])


def networks_md5(cfg: Config, workspace: Workspace, folds: Iterable[int]) -> str:
    """Return a hash of the weights of some folds and of their inference settings."""
    weights = [md5_of(workspace.fold(index) / WEIGHTS) for index in sorted(folds)]
    settings = (cfg.evaluate.threshold, cfg.evaluate.largest_component, cfg.evaluate.tta)
    return md5_of_text(f"{weights} {settings}")


def hash_files(case: Case) -> Fingerprint:
    """Return the hashes of a case's files; none if a file cannot be read, which `load_case` reports."""
    try:
        return common.fingerprint_of(case, None)
    except OSError:
        return Fingerprint(patient_id=case.patient_id)


def warn_of_shared_patients(cases: Sequence[Case], known: Mapping[str, Fingerprint]) -> None:
    """Log the patient ids that external cases share with the data set; patients of two data sets can have equal ids."""
    shared = sorted({one.patient_id for one in known.values()} & {case.patient_id for case in cases})
    if shared:
        log.warning("patient ids of both data sets: %s; exclude them if they are the same people", ", ".join(shared))


def leaks_of_external(
    external: Mapping[str, Fingerprint], *, cfg: Config, known: Mapping[str, Fingerprint]
) -> list[Leak]:
    """Return the duplicates and near-duplicates between external cases and those of the trained folds; log overruled pairs."""
    # Patients of two data sets can have equal ids, so the ids of external cases get a suffix. The oracle crop is reported by
    # the gate of the folds.
    suffix = f" of {cfg.evaluate.external_root}"
    compared = {case_id: replace(fingerprint, oracle_crop=None) for case_id, fingerprint in known.items()}
    for case_id, fingerprint in external.items():
        compared[f"{case_id}{suffix}"] = replace(fingerprint, patient_id=f"{fingerprint.patient_id}{suffix}")
    fold = Fold(train=sorted(known), val=[], test=sorted(set(compared) - set(known)))
    pairs = {
        frozenset((one, f"{other}{suffix}")): reason
        for pair, reason in common.not_duplicates(cfg).items()
        for one, other in permutations(pair, 2)
    }
    verdict = find_leaks([fold], fingerprints=compared, not_duplicates=pairs, new=fold.test)
    for line in common.overruled_lines(verdict, {}, compared):
        log.warning("%s", line)
    return verdict.leaks


def refuse_leaks(leaks: Sequence[Leak], ancestors: Sequence[Ancestor], *, num_cases: int) -> None:
    """Refuse external images of which some are images of the trained folds, or of the ancestors of their networks."""
    if leaks:
        ordered = sorted(leaks, key=str)  # threads found them
        raise InputError(
            f"{len({leak.second for leak in leaks})} of {num_cases} external images are in the data set of the trained "
            "folds or of the weights that they started from:\n  "
            + "\n  ".join([listing(ordered), *owners(leaks, ancestors)])
            + "\nList them under data.exclude."
            + (f"\n{OVERRULE}" if any(leak.check is Check.near_duplicate for leak in leaks) else "")
        )
