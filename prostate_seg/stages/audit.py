"""Stage audit: run the leak gate on any split file, with all that is known of its cases here."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.dataset import read_dataset
from prostate_seg.data.folds import read_folds, read_splits
from prostate_seg.data.layouts import has_images
from prostate_seg.data.leak_gate import Check, Fingerprint, case_ids_of, find_leaks, listing, next_step
from prostate_seg.imaging.image_io import read_volume
from prostate_seg.steps import leak_gate

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> None:
    """Log the outcome of each check; raise an InputError if there is a leak."""
    folds = read_folds(workspace.kfold_json) if cfg.audit.splits is None else read_splits(Path(cfg.audit.splits))
    fingerprints, source = _fingerprints(cfg, workspace, case_ids_of(folds))
    pairs = leak_gate.not_duplicates(cfg)
    verdict = find_leaks(folds, fingerprints=fingerprints, not_duplicates=pairs)
    for line in leak_gate.overruled_lines(verdict, pairs, fingerprints):
        log.warning("%s", line)
    num_patients = len({case.patient_id for case in fingerprints.values()})
    log.info("%d folds, %d cases of %d patients, known by %s", len(folds), verdict.num_cases, num_patients, source)
    for check, outcome in verdict.as_dict()["checks"].items():
        log.info("%-36s %s", check, outcome)
    split = sorted({leak.detail for leak in verdict.found(Check.patient)})
    if split:
        log.info("%d patients are split: %s", len(split), ", ".join(split))
    if verdict.leaks:
        raise InputError(
            f"{len(verdict.leaks)} leaks in {len(folds)} folds:\n  {listing(verdict.leaks)}\n{next_step(verdict.leaks)}"
        )


def _fingerprints(cfg: Config, workspace: Workspace, case_ids: Sequence[str]) -> tuple[dict[str, Fingerprint], str]:
    """Return the fingerprints of the cases, and their source: preprocessing, else image files, else names."""
    pattern, by_name = cfg.data.patient_pattern, {}
    for case_id in case_ids:
        found = re.search(pattern, case_id)
        if found is None or not found.group(1):
            raise InputError(
                f"{case_id}: the name does not match data.patient_pattern {pattern!r}; its first group must be the patient"
            )
        by_name[case_id] = Fingerprint(patient_id=found.group(1))
    if workspace.dataset_csv.is_file():
        dataset = read_dataset(workspace.dataset_csv)
        originals = leak_gate.with_originals(workspace, dataset)
        known = leak_gate.with_own_intensities(cfg, workspace, dataset, originals)
        source = str(workspace.dataset_csv)
    elif has_images(workspace.data):
        cases, _ = discover_cases(workspace.data, patient_pattern=pattern, exclude=[], masks_required=False)
        listed = [case for case in cases if case.case_id in by_name]
        read = map_cases(_fingerprint_of_files, listed, num_workers=cfg.machine.num_workers, label="audit")
        known = {case.case_id: fingerprint for case, fingerprint in zip(listed, read, strict=True)}
        source = f"the files in {workspace.data}"
    else:
        return by_name, "their names alone"
    absent = len(set(case_ids) - set(known))
    return {**by_name, **known}, source + (f"; {absent} of them by their names alone" if absent else "")


def _fingerprint_of_files(case: Case) -> Fingerprint:
    hashed = leak_gate.hash_files(case)
    try:
        return leak_gate.with_voxels(hashed, read_volume(case.image))
    except VolumeError:
        return hashed
