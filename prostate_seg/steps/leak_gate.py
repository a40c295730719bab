"""The leak gate of a workspace: on the folds of its data set, on the studies behind initial weights, and on external cases."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of, md5_of_text, read_json, write_json
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data import leak_gate
from prostate_seg.data.cases import Case
from prostate_seg.data.dataset import CaseRecord, read_thumbnails
from prostate_seg.data.folds import Fold, chosen_folds, read_folds
from prostate_seg.data.layouts import nfc
from prostate_seg.data.leak_gate import (
    OVERRULE,
    Check,
    Fingerprint,
    Leak,
    NotDuplicates,
    Verdict,
    find_leaks,
    fingerprints_of,
    listing,
    stop_on_leaks,
    unused_pairs,
)
from prostate_seg.data.lineage import CHECK, UNKNOWN, Ancestor, find_ancestor_leaks, outcome, owners, read_lineage
from prostate_seg.data.loading import read_mask
from prostate_seg.data.settings import NOT_DUPLICATES
from prostate_seg.imaging import fingerprint
from prostate_seg.imaging.fingerprint import thumbnail, voxels_sha1
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import content_md5, read_volume
from prostate_seg.imaging.preprocessing import preprocess_study
from prostate_seg.steps.dataset import preprocess_settings

log = logging.getLogger(__name__)

NUM_REPEATED = 3
"""Studies that the gate preprocesses again: intensities that were fitted to several studies change nearly all of them."""

SAME_GREY = 0.005
"""Mean difference of two preprocessed images, as a fraction of their range, that rounding on another machine explains."""


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
    """Return the fingerprints of a preprocessed data set, with `own_intensities` for the chosen cases.

    They are None if the original has changed since, and else whether preprocessing it again gives the stored image.
    """
    fingerprints, settings = known_fingerprints(workspace, dataset), preprocess_settings(cfg, workspace)

    def with_intensities(record: CaseRecord) -> Fingerprint:
        known = fingerprints[record.case_id]
        if content_md5(workspace.data / record.image) != record.image_md5:
            return known
        image = read_volume(workspace.data / record.image)
        mask = read_mask(workspace.data / record.mask) if settings.crop == "mask" else None
        again = preprocess_study(image, mask, settings=settings).image.array.astype(np.float32)
        stored = read_volume(_preprocessed(workspace, record)).array
        is_same = again.shape == stored.shape and np.abs(again - stored).mean() <= SAME_GREY * np.ptp(again)
        return replace(known, own_intensities=bool(is_same))

    repeated = map_cases(with_intensities, chosen, num_workers=cfg.machine.num_workers, label="leak gate")
    return fingerprints | {record.case_id: one for record, one in zip(chosen, repeated, strict=True)}


def known_fingerprints(workspace: Workspace, dataset: Mapping[str, CaseRecord]) -> dict[str, Fingerprint]:
    """Return the fingerprints that preprocessing took of the cases."""
    return fingerprints_of(dataset, read_thumbnails(workspace.thumbnails_npy, case_ids=dataset))


def with_originals(workspace: Workspace, dataset: Mapping[str, CaseRecord]) -> list[CaseRecord]:
    """Return the cases whose original image is in the data folder, sorted by case id."""
    return [record for _, record in sorted(dataset.items()) if (workspace.data / record.image).exists()]


def _preprocessed(workspace: Workspace, record: CaseRecord) -> Path:
    return workspace.preprocess / "images" / f"{record.case_id}.nii.gz"


def ancestors_in(folder: Path) -> tuple[Ancestor, ...]:
    """Return the ancestors of a trained network; one of unknown studies if it had initial weights and has lost its lineage."""
    lineage, config = read_lineage(folder), folder / "config.yaml"
    if lineage is not None:
        return lineage.ancestors
    # Earlier versions wrote no lineage, and knew no train.init.
    settings: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    source = settings.get("train", {}).get("init")
    return () if source is None else (Ancestor(weights_md5="unknown", source=source, version=None, run_id=None),)


def pass_ancestor_gate(
    folds: Mapping[str, tuple[Fold, Sequence[Ancestor]]],
    verdict: Mapping[str, Any],
    *,
    fingerprints: Mapping[str, Fingerprint],
    not_duplicates: NotDuplicates,
) -> dict[str, Any]:
    """Return the verdict of the leak gate with the outcome of the check on ancestors, which no network without them has.

    Args:
        folds: Val and test cases of each fold, by its name, and the ancestors of its network, not to be trained on them.
        verdict: `Verdict.as_dict()` of the gate on the folds.
        fingerprints: Of the val and test cases.
        not_duplicates: Accepted pairs, a case and an ancestor's study each.

    Raises:
        InputError: If a val or test case is a study that an ancestor was trained on.
    """
    overruled: list[str] = []
    for name, (fold, ancestors) in folds.items():
        subsets = {"val": fold.val, "test": fold.test}
        found = find_ancestor_leaks(ancestors, **subsets, fingerprints=fingerprints, not_duplicates=not_duplicates)
        if found.leaks:
            raise InputError(
                f"{name}: its initial weights, or weights that those started from, were trained on its val or test cases:\n  "
                + "\n  ".join([listing(found.leaks), *owners(found.leaks, ancestors)])
                + "\nStart from weights that were not trained on them, move them to train in kfold.json, or list them under "
                "data.exclude and run the pipeline again from stage=preprocess."
                + (f"\n{OVERRULE}" if found.found(Check.near_duplicate) else "")
            )
        overruled += [text for text in found.overruled.values() if text not in overruled]
    return with_ancestors(verdict, [one for _, ancestors in folds.values() for one in ancestors], overruled=overruled)


def with_ancestors(
    verdict: Mapping[str, Any], ancestors: Sequence[Ancestor], *, overruled: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a verdict with the outcome of the check on ancestors; log what is not known, and what was overruled."""
    if not ancestors:
        return dict(verdict)
    for pair in overruled:
        log.warning("fold.not_duplicates lets near-identical images pass: %s", pair)
    text = outcome(ancestors, num_overruled=len(overruled))
    words = str(verdict["verdict"])
    if text.startswith(UNKNOWN):
        log.warning("the leak gate cannot check whether ancestors were trained on val or test cases: %s", text)
        words = f"{UNKNOWN}: {CHECK}" if words.startswith("passed") else f"{words}; {UNKNOWN}: {CHECK}"
    checks = {**verdict["checks"], CHECK: text}
    return {**verdict, "verdict": words, "checks": checks, "overruled": [*verdict["overruled"], *overruled]}


def with_voxels(hashed: Fingerprint, image: Volume) -> Fingerprint:
    """Return a fingerprint with the values that come from the decoded image."""
    return replace(hashed, voxels_sha1=voxels_sha1(image), thumbnail=thumbnail(image))


def hash_files(case: Case) -> Fingerprint:
    """Return the hashes of a case's files; none if a file cannot be read, which the reader of images reports."""
    try:
        image_md5, mask_md5 = (None if path is None else content_md5(path) for path in (case.image, case.mask))
    except OSError:
        image_md5 = mask_md5 = None
    return Fingerprint(patient_id=case.patient_id, image_md5=image_md5, mask_md5=mask_md5)


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
    compared = {case_id: replace(case, oracle_crop=None) for case_id, case in known.items()}
    for case_id, case in external.items():
        compared[f"{case_id}{suffix}"] = replace(case, patient_id=f"{case.patient_id}{suffix}")
    fold = Fold(train=sorted(known), val=[], test=sorted(set(compared) - set(known)))
    pairs = {
        frozenset((one, f"{other}{suffix}")): reason
        for pair, reason in not_duplicates(cfg).items()
        for one, other in permutations(pair, 2)
    }
    verdict = find_leaks([fold], fingerprints=compared, not_duplicates=pairs, new=fold.test)
    for line in overruled_lines(verdict, {}, compared):
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
