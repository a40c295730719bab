"""Steps that several stages share: the settings of preprocessing, checks of the workspace's files, and the leak gate."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of, md5_of_text, read_json, write_json
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data import leak_gate
from prostate_seg.data.cases import Case
from prostate_seg.data.dataset import (
    CaseRecord,
    chosen_settings,
    read_dataset,
    read_thumbnails,
    recorded_labels,
    require_contract,
)
from prostate_seg.data.folds import Fold, chosen_folds, read_folds
from prostate_seg.data.label_names import label_names, region_labels
from prostate_seg.data.layouts import nfc
from prostate_seg.data.leak_gate import Check, Fingerprint, Verdict, fingerprints_of, stop_on_leaks, unused_pairs
from prostate_seg.data.loading import read_mask
from prostate_seg.data.settings import NOT_DUPLICATES
from prostate_seg.imaging import fingerprint
from prostate_seg.imaging.fingerprint import thumbnail, voxels_sha1
from prostate_seg.imaging.geometry import Spacing, Volume
from prostate_seg.imaging.image_io import content_md5, read_volume
from prostate_seg.imaging.preprocessing import PreprocessSettings, preprocess_study
from prostate_seg.imaging.quality import CaseQuality, Finding, check_slice_planes, check_zones
from prostate_seg.imaging.regions import Regions
from prostate_seg.imaging.target_grid import auto_names

log = logging.getLogger(__name__)

NUM_REPEATED = 3
"""Studies that the gate preprocesses again: intensities that were fitted to several studies change nearly all of them."""

SAME_GREY = 0.005
"""Mean difference of two preprocessed images, as a fraction of their range, that rounding on another machine explains."""


def preprocess_settings(cfg: Config, workspace: Workspace) -> PreprocessSettings:
    """Return the settings that decide the network's input; stage=preprocess has chosen the values of those that are auto."""
    chosen = chosen_settings(workspace.contract_json, auto_names(cfg.preprocess))
    return PreprocessSettings.of(cfg.preprocess, regions=_regions_of_data(cfg, workspace), chosen=chosen)


def _regions_of_data(cfg: Config, workspace: Workspace) -> Regions:
    """Return the labels of each region in the data set; stage=preprocess has recorded the names in its files."""
    is_recorded = len(cfg.target.regions) > 1 and cfg.data.labels is None
    names = recorded_labels(workspace.contract_json) if is_recorded else cfg.data.labels
    return region_labels(cfg.target.regions, names=names, whole_gland_labels=cfg.data.whole_gland_labels)


def reference_regions(cfg: Config, workspace: Workspace) -> Regions:
    """Return the labels of each region in the masks that are evaluated: those of the data set, or of evaluate.external_root."""
    if cfg.evaluate.external_root is None:
        return _regions_of_data(cfg, workspace)
    root = Path(cfg.evaluate.external_root)
    names = label_names(root, given=cfg.evaluate.external_labels) if len(cfg.target.regions) > 1 else None
    try:
        return region_labels(cfg.target.regions, names=names, whole_gland_labels=cfg.data.whole_gland_labels)
    except InputError as error:
        text = str(error).replace("data.labels=", "evaluate.external_labels=")
        raise InputError(f"{root}: {text}") from error


def checked_dataset(cfg: Config, workspace: Workspace) -> dict[str, CaseRecord]:
    """Return dataset.csv after checking that it was made with this config's preprocessing."""
    require_contract(workspace.contract_json, preprocess_settings(cfg, workspace))
    return read_dataset(workspace.dataset_csv)


def checked_folds(
    cfg: Config, workspace: Workspace, dataset: Mapping[str, CaseRecord]
) -> tuple[dict[int, Fold], dict[str, Any]]:
    """Return the folds to work on, by index, and the verdict of the leak gate on all folds; refuse folds that leak."""
    folds = read_folds(workspace.kfold_json)
    return chosen_folds(folds, index=cfg.fold.index), pass_leak_gate(cfg, workspace, folds, dataset)


def pass_leak_gate(
    cfg: Config, workspace: Workspace, folds: Sequence[Fold], dataset: Mapping[str, CaseRecord]
) -> dict[str, Any]:
    """Return `Verdict.as_dict()` on folds.

    The windows of preprocess.crop=mask are recorded as a leak without an error. The verdict on these folds, files and settings
    is kept in the cache, so that later stages do not compare all pairs again.

    Raises:
        InputError: If the folds leak.
    """
    present = with_originals(workspace, dataset)
    sample = present[:: max(1, len(present) // NUM_REPEATED)][:NUM_REPEATED]  # spread over the data set
    read = [workspace.dataset_csv, workspace.thumbnails_npy, *(_preprocessed(workspace, record) for record in sample)]
    code = [Path(str(module.__file__)) for module in (leak_gate, fingerprint)]
    settings = [
        cfg.fold.not_duplicates,
        preprocess_settings(cfg, workspace).as_dict(),
        [fold.subsets() for fold in folds],
    ]
    key = md5_of_text(json.dumps([[md5_of(path) for path in [*read, *code] if path.is_file()], settings]))
    record = workspace.cache / "leak_gate.json"
    known = read_json(record) if record.is_file() else {}
    if known.get("key") != key:
        fingerprints = with_own_intensities(cfg, workspace, dataset, sample)
        allowed = [Check.oracle_crop] if cfg.preprocess.crop == "mask" else []
        pairs = not_duplicates(cfg)
        verdict = stop_on_leaks(folds, fingerprints=fingerprints, allowed=allowed, not_duplicates=pairs)
        warnings = overruled_lines(verdict, pairs, fingerprints)
        known = {"key": key, "verdict": verdict.as_dict(), "warnings": warnings}
        write_json(record, known)
    for line in known["warnings"]:
        log.warning("%s", line)
    return dict(known["verdict"])


def not_duplicates(cfg: Config, *, recorded: Sequence[str] = ()) -> dict[frozenset[str], str]:
    """Return the reason of each pair in fold.not_duplicates, of this run and of a recorded one, by its case ids."""
    found = [NOT_DUPLICATES.fullmatch(pair) for pair in (*recorded, *cfg.fold.not_duplicates)]
    return {frozenset((nfc(one["first"]), nfc(one["second"]))): one["reason"] for one in found if one}


def overruled_lines(
    verdict: Verdict, pairs: Mapping[frozenset[str], str], fingerprints: Mapping[str, Fingerprint]
) -> list[str]:
    """Return a line for each pair of fold.not_duplicates: the near-duplicates that it lets pass, or why it has no effect."""
    unused = unused_pairs(pairs, fingerprints=fingerprints, verdict=verdict)
    return [
        *(f"fold.not_duplicates lets near-identical images pass: {pair}" for pair in verdict.overruled.values()),
        *(f"fold.not_duplicates changes nothing: {text}" for text in unused),
    ]


def with_own_intensities(
    cfg: Config, workspace: Workspace, dataset: Mapping[str, CaseRecord], chosen: Sequence[CaseRecord]
) -> dict[str, Fingerprint]:
    """Return the fingerprints of a preprocessed data set, with `own_intensities` for the chosen cases."""
    fingerprints = fingerprints_of(dataset, read_thumbnails(workspace.thumbnails_npy, case_ids=dataset))
    repeat = partial(_has_own_intensities, settings=preprocess_settings(cfg, workspace), workspace=workspace)
    outcomes = map_cases(repeat, chosen, num_workers=cfg.machine.num_workers, label="leak gate")
    for record, own_intensities in zip(chosen, outcomes, strict=True):
        fingerprints[record.case_id] = replace(fingerprints[record.case_id], own_intensities=own_intensities)
    return fingerprints


def with_originals(workspace: Workspace, dataset: Mapping[str, CaseRecord]) -> list[CaseRecord]:
    """Return the cases whose original image is in the data folder, sorted by case id."""
    return [record for _, record in sorted(dataset.items()) if (workspace.data / record.image).exists()]


def _preprocessed(workspace: Workspace, record: CaseRecord) -> Path:
    return workspace.preprocess / "images" / f"{record.case_id}.nii.gz"


def _has_own_intensities(record: CaseRecord, *, settings: PreprocessSettings, workspace: Workspace) -> bool | None:
    """Return whether preprocessing the original again gives the stored image; None if the original has changed since."""
    if content_md5(workspace.data / record.image) != record.image_md5:
        return None
    image = read_volume(workspace.data / record.image)
    mask = read_mask(workspace.data / record.mask) if settings.crop == "mask" else None
    again = preprocess_study(image, mask, settings=settings).image.array.astype(np.float32)
    stored = read_volume(_preprocessed(workspace, record)).array
    if again.shape != stored.shape:
        return False
    return bool(np.abs(again - stored).mean() <= SAME_GREY * np.ptp(again))


def fingerprint_of(case: Case, image: Volume | None) -> Fingerprint:
    """Return the fingerprint of a case from its files; an image that is not read, None, has its hash alone."""
    hashed = Fingerprint(
        patient_id=case.patient_id,
        image_md5=content_md5(case.image),
        mask_md5=None if case.mask is None else content_md5(case.mask),
    )
    return hashed if image is None else with_voxels(hashed, image)


def with_voxels(hashed: Fingerprint, image: Volume) -> Fingerprint:
    """Return a fingerprint with the values that come from the decoded image."""
    return replace(hashed, voxels_sha1=voxels_sha1(image), thumbnail=thumbnail(image))


def findings_of_data_set(
    qualities: Mapping[str, CaseQuality],
    *,
    md5s: Mapping[str, Mapping[str, str]],
    spacings_mm: Mapping[str, Spacing],
    labels: Sequence[int] | None,
) -> list[Finding]:
    """Return the findings on each case, then those of comparing cases: shared files, missing zones, other slice planes.

    Args:
        qualities: Checks of each case, by case id.
        md5s: md5 by kind, image or mask, and by case id.
        spacings_mm: Voxel edges along z, y, x of each image, by case id.
        labels: Mask labels that are gland; None takes every label above 0.
    """
    findings = [finding for quality in qualities.values() for finding in quality.findings]
    for kind, of_cases in md5s.items():
        first_with: dict[str, str] = {}
        for case_id, md5 in of_cases.items():
            if md5 in first_with:  # one image under two names, or one mask for two images
                message = f"its {kind} file is identical to that of {first_with[md5]}"
                findings.append(Finding(case_id=case_id, check=f"identical_{kind}", is_error=False, message=message))
            first_with.setdefault(md5, case_id)
    gland_labels = {
        case_id: [label for label in quality.reference.labels_ml if labels is None or label in labels]
        for case_id, quality in qualities.items()
        if quality.reference is not None
    }
    return [*findings, *check_zones(gland_labels), *check_slice_planes(spacings_mm)]
