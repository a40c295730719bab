"""Stage evaluate: segment the original test images, and compare the masks with the references on the images' own grid.

The stage returns no objective, so that no sweep selects a setting on test cases. Each image is decoded and hashed once; those
of an external folder are compared with the images of the trained folds before a network segments them.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder, md5_of, md5_of_text, write_csv, write_json
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.label_names import require_gland_names
from prostate_seg.data.leak_gate import Leak
from prostate_seg.data.lineage import Ancestor, studies_by_name
from prostate_seg.data.loading import LoadedCase, load_case, read_mask, refuse_or_exclude
from prostate_seg.imaging.geometry import Finding
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.evaluation import tables, trust
from prostate_seg.reporting.evaluation.tables import CaseResult
from prostate_seg.reporting.figures.overlays import RegionMasks, overlay_figure, overlay_title
from prostate_seg.reporting.figures.plots import case_metrics_figure, save_png
from prostate_seg.segmentation.calibration import bin_logits, count_near_surface
from prostate_seg.segmentation.inference.inference import Predictor, segment
from prostate_seg.segmentation.metrics import case_metrics
from prostate_seg.segmentation.networks.storage import WEIGHTS
from prostate_seg.segmentation.overlap import slice_counts
from prostate_seg.steps import leak_gate
from prostate_seg.steps.dataset import allows_other_labels, preprocess_settings
from prostate_seg.steps.evaluation import Evaluation, Md5s

log = logging.getLogger(__name__)

MAX_VAL_STUDIES = 20
"""Val studies, over all folds, that the temperature is fitted to: hundreds of thousands of voxels for one number."""


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write evaluation/ (or evaluation_external/): tables, metrics.json, summary.json, masks and overlays."""
    evaluation = Evaluation.of(cfg, workspace)
    ancestors = {index: leak_gate.ancestors_in(workspace.fold(index)) for index in evaluation.folds}
    external = None if cfg.evaluate.external_root is None else Path(cfg.evaluate.external_root)
    target = workspace.evaluation if external is None else workspace.external_evaluation
    with atomic_folder(target) as folder:
        if external is None:
            tested = {f"fold {i}": (replace(fold, val=[]), ancestors[i]) for i, fold in evaluation.folds.items()}
            known = leak_gate.known_fingerprints(workspace, evaluation.dataset)
            pairs = leak_gate.not_duplicates(cfg)
            verdict = leak_gate.pass_ancestor_gate(tested, evaluation.verdict, fingerprints=known, not_duplicates=pairs)
            results = evaluate_test_cases(evaluation, folder)
        else:
            everyone = list(chain.from_iterable(ancestors.values()))
            results = evaluate_external_cases(evaluation, folder, external, everyone)
            verdict = leak_gate.with_ancestors(evaluation.verdict, everyone)
        summary, trusted = write_tables(evaluation, folder, results, verdict)
        draw_results(evaluation, folder, [result for result in results if result.region == WHOLE_GLAND])
    for line in [*tables.summary_lines(summary), *trust.trust_lines(summary["trust"], trusted)]:
        log.info("%s", line)
    log.info("tables, masks and overlays are in %s", target)
    return StageResult(
        inputs=[external or workspace.data, workspace.preprocess, workspace.kfold_json, workspace.model],
        outputs=[target],
        metrics={f"test/{name}": mean for name, mean in tables.flat_summary(summary)["test"].items()},
        figures=[target / "cases.png", *sorted((target / "overlays").glob("*.png"))],
        tables=[target / name for name in ("cases.csv", "slices.csv", "metrics.json", "expected_dice.csv")],
        tags={"leak_gate": verdict["verdict"]},
        description=tables.summary_markdown(summary),
    )


def evaluate_test_cases(evaluation: Evaluation, folder: Path) -> list[CaseResult]:
    """Evaluate the network of each fold on the fold's own test cases; the results of a case have the order of the regions."""
    if not any(fold.test for fold in evaluation.folds.values()):
        raise InputError(
            "there are no test cases: fold=all trains on all but val\n"
            "Use evaluate.external_root=DIR with other cases, or fold=kfold."
        )
    results: list[CaseResult] = []
    for index, fold in evaluation.folds.items():
        measure = case_evaluator(evaluation, evaluation.predictor_of([index]), folder=folder, name=f"fold{index}")
        found = evaluation.map_cases(measure, fold.test, label=f"evaluate fold {index}")
        results += chain.from_iterable(found)
    return results


def case_evaluator(
    evaluation: Evaluation, predictor: Predictor, *, folder: Path, name: str
) -> Callable[[Case, LoadedCase, Md5s], list[CaseResult]]:
    """Return the function that evaluates a case with some networks.

    It segments the original image, writes the label map on its grid, and measures each region against the reference.
    """

    def evaluate_case(case: Case, loaded: LoadedCase, md5s: Md5s) -> list[CaseResult]:
        found = segment(loaded.image, loaded.mask, predictor=predictor)
        write_volume(_mask_path(folder, name, case.case_id), loaded.image.with_mask(found.label_map))
        pairs = evaluation.region_pairs(loaded.mask.array, found.label_map)
        spacing_mm = loaded.image.geometry.spacing_mm
        results = []
        for (region, (reference, mask)), probability in zip(pairs.items(), found.probability, strict=True):
            counts = slice_counts(reference, mask)
            result = CaseResult(
                fold=name,
                case=case,
                image_md5=md5s[0],
                mask_md5=md5s[1],
                metrics=case_metrics(reference, mask, spacing_mm=spacing_mm, counts=counts),
                counts=counts,
                region=region,
                features=found.features,
                voxels=count_near_surface(reference, mask, probability, spacing_mm=spacing_mm),
            )
            results.append(result)
        return results

    return evaluate_case


def write_tables(
    evaluation: Evaluation, folder: Path, results: Sequence[CaseResult], verdict: dict[str, Any]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Write the tables, metrics.json and summary.json; return the content of metrics.json and of expected_dice.csv."""
    cfg, oracle_crop = evaluation.cfg.evaluate, evaluation.oracle_crop
    val_voxels = count_val_voxels(evaluation) if cfg.external_root is None else {}
    counts = {"val": val_voxels, "test": trust.voxels_of_regions(results)}
    expected_dice = trust.expected_dice_table(results, coverage=cfg.coverage)
    summary = tables.summarise_folds(
        results, oracle_crop=oracle_crop, num_bootstrap=cfg.num_bootstrap, seed=evaluation.cfg.seed
    )
    summary["leak_gate"] = verdict
    summary["trust"] = {
        "networks_md5": networks_md5(evaluation),
        **trust.fitted_expected_dice(expected_dice, coverage=cfg.coverage, oracle_crop=oracle_crop),
        "calibration": trust.calibration_errors(counts),
    }
    if zones := preprocess_settings(evaluation.cfg, evaluation.workspace).zones:
        summary["labels"] = {name: list(labels) for name, labels in zones.items()}
    write_csv(folder / "cases.csv", tables.cases_table(results, oracle_crop=oracle_crop))
    write_csv(folder / "slices.csv", tables.slices_table(results), float_format="%.6g")
    write_csv(folder / "expected_dice.csv", expected_dice, float_format="%.6g")
    write_csv(folder / "calibration.csv", trust.calibration_table(counts))
    write_json(folder / "metrics.json", summary)
    write_json(folder / "summary.json", tables.flat_summary(summary))
    return summary, expected_dice


def count_val_voxels(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Count the voxels near the surface of each region by logit, over val studies of each fold segmented by its network."""
    data, dataset, folds = evaluation.workspace.data, evaluation.dataset, evaluation.folds
    counts = {region: np.zeros((2, len(bin_logits())), dtype=np.int64) for region in evaluation.regions}
    for index, fold in folds.items():
        predictor = evaluation.predictor_of([index])

        def count(_case: Case, loaded: LoadedCase, _md5s: Md5s, predictor: Predictor = predictor) -> list[np.ndarray]:
            found = segment(loaded.image, loaded.mask, predictor=predictor, with_features=False)
            pairs = zip(
                evaluation.region_pairs(loaded.mask.array, found.label_map).values(), found.probability, strict=True
            )
            spacing_mm = loaded.image.geometry.spacing_mm
            return [count_near_surface(*pair, probability, spacing_mm=spacing_mm) for pair, probability in pairs]

        present = [case_id for case_id in fold.val if (data / dataset[case_id].image).exists()]
        chosen = present[:: max(1, math.ceil(len(present) * len(folds) / MAX_VAL_STUDIES))]
        found = evaluation.map_cases(count, chosen, label=f"calibrate fold {index}")
        for region, *of_studies in zip(counts, *found, strict=True):
            counts[region] = sum(of_studies, counts[region])
    return counts


def evaluate_external_cases(
    evaluation: Evaluation, folder: Path, root: Path, ancestors: Sequence[Ancestor]
) -> list[CaseResult]:
    """Evaluate the ensemble of the folds on the cases of another data folder; refuse cases that it or its ancestors have seen.

    Copied files are refused before an image is read. Near-duplicates are known only once the image is decoded: from the first
    one on, no network runs, and the remaining images are compared only, so that the error lists all of them.
    """
    cfg, workspace = evaluation.cfg, evaluation.workspace
    cases, findings = discover_cases(
        root, patient_pattern=cfg.data.patient_pattern, exclude=cfg.data.exclude, exclude_others=True
    )
    require_gland_names(root, labels=cfg.data.whole_gland_labels, given=cfg.evaluate.external_labels)
    known = leak_gate.known_fingerprints(workspace, evaluation.dataset)
    leak_gate.warn_of_shared_patients(cases, known)
    known |= studies_by_name(study for ancestor in ancestors for study in ancestor.studies)
    compare = partial(leak_gate.leaks_of_external, cfg=cfg, known=known)
    hashed = map_cases(leak_gate.hash_files, cases, num_workers=cfg.machine.num_workers, label="hash")
    external = {case.case_id: fingerprint for case, fingerprint in zip(cases, hashed, strict=True)}
    leak_gate.refuse_leaks(compare(external), ancestors, num_cases=len(cases))
    measure = case_evaluator(evaluation, evaluation.predictor_of(evaluation.folds), folder=folder, name="ensemble")
    leaks: list[Leak] = []
    load = partial(load_case, labels=evaluation.regions[WHOLE_GLAND], allow_others=allows_other_labels(cfg))

    def evaluate(case: Case) -> tuple[list[CaseResult], list[Finding]]:
        loaded, quality = load(case)
        if loaded is None:
            return [], quality.findings
        fingerprint = leak_gate.with_voxels(external[case.case_id], loaded.image)
        leaks.extend(compare({case.case_id: fingerprint}))
        md5s = str(fingerprint.image_md5), str(fingerprint.mask_md5)
        return [] if leaks else measure(case, loaded, md5s), quality.findings

    outcomes = map_cases(evaluate, cases, num_workers=cfg.machine.num_workers, label="evaluate")
    leak_gate.refuse_leaks(leaks, ancestors, num_cases=len(cases))
    findings += [finding for _, found in outcomes for finding in found]
    num_usable = sum(bool(of_case) for of_case, _ in outcomes)
    refuse_or_exclude(findings, num_usable=num_usable, exclude=cfg.data.on_bad_case == "exclude")
    return [result for of_case, _ in outcomes for result in of_case]


def draw_results(evaluation: Evaluation, folder: Path, glands: Sequence[CaseResult]) -> None:
    """Draw the metrics of all cases, and the overlays of the worst, the median and the best.

    The files of these three are read again, because the median case is known only after the last one.
    """
    save_png(folder / "cases.png", case_metrics_figure(tables.cases_table(glands, oracle_crop=evaluation.oracle_crop)))
    ordered = sorted(glands, key=lambda result: result.metrics.dice)
    for name, result in {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}.items():
        case = result.case
        assert case.mask is not None
        image, label_map = read_volume(case.image), read_volume(_mask_path(folder, result.fold, case.case_id))
        pairs = evaluation.region_pairs(read_mask(case.mask).array, label_map.array)
        regions = [RegionMasks(name=region, predicted=mask, reference=true) for region, (true, mask) in pairs.items()]
        title = f"{name}: {overlay_title(case.case_id, result.metrics)}"
        figure = overlay_figure(image.array, regions, spacing_mm=image.geometry.spacing_mm, title=title)
        save_png(folder / "overlays" / f"{name}.png", figure)


def _mask_path(folder: Path, fold: str, case_id: str) -> Path:
    return folder / "masks" / fold / f"{case_id}.nii.gz"


def networks_md5(evaluation: Evaluation) -> str:
    """Return a hash of the weights of the folds and of their inference settings."""
    weights = [md5_of(evaluation.workspace.fold(index) / WEIGHTS) for index in sorted(evaluation.folds)]
    evaluate = evaluation.cfg.evaluate
    return md5_of_text(f"{weights} {(evaluate.threshold, evaluate.largest_component, evaluate.tta)}")
