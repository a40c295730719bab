"""What several stages share: the config's preprocessing as a contract, and what lies in the workspace, checked."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial

import numpy as np

from prostate_seg.common.errors import VolumeError
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.cases import Case
from prostate_seg.data.dataset import CaseRecord, read_dataset, read_thumbnails, require_contract
from prostate_seg.data.folds import Fold, chosen_folds, read_folds
from prostate_seg.data.layouts import nfc
from prostate_seg.data.leak_gate import Check, Fingerprint, Verdict, fingerprints_of, idle_pairs, stop_on_leaks
from prostate_seg.data.loading import read_mask
from prostate_seg.data.settings import NOT_DUPLICATES
from prostate_seg.imaging.fingerprint import thumbnail, voxels_sha1
from prostate_seg.imaging.image_io import content_md5, read_volume
from prostate_seg.imaging.preprocessing import PreprocessSettings, preprocess_study
from prostate_seg.imaging.quality import Finding

log = logging.getLogger(__name__)


def preprocess_settings(cfg: Config) -> PreprocessSettings:
    """Return all of the config that decides what a network sees."""
    values = {field.name: getattr(cfg.preprocess, field.name) for field in fields(cfg.preprocess)}
    return PreprocessSettings(**values, whole_gland_labels=cfg.data.whole_gland_labels)


def checked_dataset(cfg: Config, workspace: Workspace) -> dict[str, CaseRecord]:
    """Return dataset.csv after making sure that it was made with this config's preprocessing."""
    require_contract(workspace.contract_json, preprocess_settings(cfg))
    return read_dataset(workspace.dataset_csv)


def checked_folds(cfg: Config, workspace: Workspace, dataset: dict[str, CaseRecord]) -> tuple[dict[int, Fold], Verdict]:
    """Return the folds to work on, by index, and what the leak gate said of all of them.

    Raises:
        InputError: If the folds leak.
    """
    folds = read_folds(workspace.kfold_json)
    return chosen_folds(folds, index=cfg.fold.index), pass_leak_gate(cfg, workspace, folds, dataset)


def pass_leak_gate(
    cfg: Config, workspace: Workspace, folds: Sequence[Fold], dataset: Mapping[str, CaseRecord]
) -> Verdict:
    """Check folds for leaks; a crop that the config itself centres on the reference is noted and stops nothing.

    Raises:
        InputError: If the folds leak.
    """
    identities = known_identities(cfg, workspace, dataset, num_remade=NUM_REMADE)
    allowed = [Check.oracle_crop] if cfg.preprocess.crop == "mask" else []
    pairs = not_duplicates(cfg)
    verdict = stop_on_leaks(folds, identities=identities, allowed=allowed, not_duplicates=pairs)
    log_overruled(verdict, pairs, identities)
    return verdict


def not_duplicates(cfg: Config) -> dict[frozenset[str], str]:
    """Return the reason of each pair in fold.not_duplicates, by its case ids."""
    found = [NOT_DUPLICATES.fullmatch(pair) for pair in cfg.fold.not_duplicates]
    return {frozenset((nfc(one["first"]), nfc(one["second"]))): one["reason"] for one in found if one}


def log_overruled(verdict: Verdict, pairs: Mapping[frozenset[str], str], identities: Mapping[str, Fingerprint]) -> None:
    """Log the pairs that fold.not_duplicates lets pass, and those of its pairs that change nothing."""
    for pair in verdict.overruled:
        log.warning("fold.not_duplicates lets near-identical images pass: %s", pair)
    for text in idle_pairs(pairs, identities=identities, verdict=verdict):
        log.warning("fold.not_duplicates changes nothing: %s", text)


NUM_REMADE = 3
"""Studies that are preprocessed again before a stage: intensities that were fitted to several studies change nearly all."""

SAME_GREY = 0.005
"""Mean difference of two preprocessed images, as a part of their range, that rounding on another machine explains."""


def known_identities(
    cfg: Config, workspace: Workspace, dataset: Mapping[str, CaseRecord], *, num_remade: int | None
) -> dict[str, Fingerprint]:
    """Return all that is known of the cases of a preprocessed data set.

    Args:
        cfg: The settings that the data set was preprocessed with.
        workspace: Where it lies.
        dataset: Its rows, by case id.
        num_remade: Number of studies, spread over the data set, that are preprocessed again from their originals alone, where
            those are there; None for all.
    """
    identities = fingerprints_of(dataset, read_thumbnails(workspace.thumbnails_npy, case_ids=dataset))
    there = [row for _, row in sorted(dataset.items()) if (workspace.data / row.image).exists()]
    every = max(1, len(there) // num_remade) if num_remade else 1
    chosen = there[::every][:num_remade]
    remake = partial(_is_made_of_its_study_alone, settings=preprocess_settings(cfg), workspace=workspace)
    outcomes = map_cases(remake, chosen, num_workers=cfg.machine.num_workers, label="leak gate")
    for row, own in zip(chosen, outcomes, strict=True):
        identities[row.case_id] = replace(identities[row.case_id], own_intensities=own)
    return identities


def identical_files(md5s: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Warn of cases that share a file: one image under two names, or one mask for two images.

    Args:
        md5s: md5 by kind, image or mask, and by case id.
    """
    findings = []
    for kind, of_cases in md5s.items():
        first_with: dict[str, str] = {}
        for case_id, md5 in of_cases.items():
            if md5 in first_with:
                message = f"its {kind} file is identical to that of {first_with[md5]}"
                findings.append(Finding(case_id=case_id, check=f"identical_{kind}", is_error=False, message=message))
            first_with.setdefault(md5, case_id)
    return findings


def identity_of_files(case: Case) -> Fingerprint:
    """Return what the files of a case tell; of an image that cannot be read only its hash."""
    identity = Fingerprint(
        patient_id=case.patient_id,
        image_md5=content_md5(case.image),
        mask_md5=None if case.mask is None else content_md5(case.mask),
    )
    try:
        image = read_volume(case.image)
    except VolumeError:
        return identity
    return replace(identity, voxels_sha1=voxels_sha1(image), thumbnail=thumbnail(image))


def _is_made_of_its_study_alone(row: CaseRecord, *, settings: PreprocessSettings, workspace: Workspace) -> bool | None:
    """Return whether preprocessing the original again gives the stored image; None when the original is another by now."""
    if content_md5(workspace.data / row.image) != row.image_md5:
        return None
    image = read_volume(workspace.data / row.image)
    mask = read_mask(workspace.data / row.mask) if settings.crop == "mask" else None
    again = preprocess_study(image, mask, settings=settings).image.array.astype(np.float32)
    stored = read_volume(workspace.preprocess / "images" / f"{row.case_id}.nii.gz").array
    if again.shape != stored.shape:
        return False
    return bool(np.abs(again - stored).mean() <= SAME_GREY * np.ptp(again))
