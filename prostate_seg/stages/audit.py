"""Stage audit: let the leak gate look at any split file, with all that can be known of its cases here."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from prostate_seg.common.errors import InputError
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import discover_cases
from prostate_seg.data.dataset import read_dataset
from prostate_seg.data.folds import Fold, read_folds
from prostate_seg.data.layouts import has_images
from prostate_seg.data.leak_gate import Check, Fingerprint, Verdict, find_leaks, listing, next_step
from prostate_seg.data.split_files import read_splits
from prostate_seg.stages.common import identity_of_files, known_identities, log_overruled, not_duplicates

log = logging.getLogger(__name__)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Print what each check found; end with an error when there is a leak."""
    folds = read_folds(workspace.kfold_json) if cfg.audit.splits is None else read_splits(Path(cfg.audit.splits))
    case_ids = sorted({case_id for fold in folds for part in fold.parts().values() for case_id in part})
    identities, source = _identities(cfg, workspace, case_ids)
    pairs = not_duplicates(cfg)
    verdict = find_leaks(folds, identities=identities, not_duplicates=pairs)
    log_overruled(verdict, pairs, identities)
    for line in describe(folds, verdict, identities, source=source):
        log.info("%s", line)
    if verdict.leaks:
        raise InputError(
            f"{len(verdict.leaks)} leaks in {len(folds)} folds:\n  {listing(verdict.leaks)}\n{next_step(verdict.leaks)}"
        )
    return StageResult()


def describe(
    folds: Sequence[Fold], verdict: Verdict, identities: Mapping[str, Fingerprint], *, source: str
) -> list[str]:
    """Return the outcome of every check, and the patients that are split, as lines for a terminal."""
    patients = {case.patient_id for case in identities.values()}
    lines = [f"{len(folds)} folds, {verdict.num_cases} cases of {len(patients)} patients, known by {source}"]
    lines += [f"{check:<36} {outcome}" for check, outcome in verdict.as_dict()["checks"].items()]
    split = sorted({leak.detail for leak in verdict.found(Check.patient)})
    return [*lines, *([f"{len(split)} patients are split: {', '.join(split)}"] if split else [])]


def _identities(cfg: Config, workspace: Workspace, case_ids: Sequence[str]) -> tuple[dict[str, Fingerprint], str]:
    """Return the most that can be known of the cases, and where it comes from: preprocessing, image files, or names."""
    named = {case_id: Fingerprint(patient_id=_patient(case_id, cfg.data.patient_pattern)) for case_id in case_ids}
    if workspace.dataset_csv.is_file():
        dataset = read_dataset(workspace.dataset_csv)
        known = known_identities(cfg, workspace, dataset, num_remade=None)
        source = str(workspace.dataset_csv)
    elif has_images(workspace.data):
        pattern = cfg.data.patient_pattern
        cases, _ = discover_cases(workspace.data, patient_pattern=pattern, exclude=[], masks_required=False)
        listed = [case for case in cases if case.case_id in named]
        read = map_cases(identity_of_files, listed, num_workers=cfg.machine.num_workers, label="audit")
        known = {case.case_id: identity for case, identity in zip(listed, read, strict=True)}
        source = f"the files in {workspace.data}"
    else:
        return named, "their names alone"
    absent = len(set(case_ids) - set(known))
    return {**named, **known}, source + (f"; {absent} of them by their names alone" if absent else "")


def _patient(case_id: str, pattern: str) -> str:
    found = re.search(pattern, case_id)
    if found is None or not found.group(1):
        raise InputError(
            f"{case_id}: the name does not match data.patient_pattern {pattern!r}; its first group must be the patient"
        )
    return found.group(1)
