"""Division of the patients into train, val and test. Patients are never split; lists hold case ids, sorted."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json, write_json
from prostate_seg.common.seeds import Stream, integer_seed, seed_sequence
from prostate_seg.data.dataset import CaseRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Case ids of one fold."""

    train: list[str]
    """Fit the weights."""
    val: list[str]
    """Choose the checkpoint."""
    test: list[str]
    """Measured once, at the end; empty for a final model."""

    def parts(self) -> dict[str, list[str]]:
        """Return the parts by name."""
        return {"train": self.train, "val": self.val, "test": self.test}


def kfold(cases: Sequence[CaseRecord], *, num_folds: int, val_fraction: float, seed: int) -> list[Fold]:
    """Divide the patients for cross-validation, so that every patient is in the test subset of exactly one fold.

    Test subsets differ by one patient at most and have similar gland volumes.

    Raises:
        InputError: If there are too few patients for a train, a val and a test subset.
    """
    from sklearn.model_selection import StratifiedKFold  # takes a second to import; most stages only read folds

    volumes = patient_volumes(cases)
    # Two patients must be left outside the largest test subset: one to train and one for val.
    needed = 4 if num_folds == 2 else num_folds
    _require_patients(volumes, needed=needed, purpose=f"fold.num_folds={num_folds} with a val subset")
    # A patient is one sample however many studies it has, so the folds are grouped by patient and equal in patients, which
    # StratifiedGroupKFold over studies does not promise. The finest strata that still reach every fold balance best.
    patients = sorted(volumes)
    strata = _volume_strata([volumes[patient] for patient in patients], num_strata=len(patients) // num_folds)
    random_state = integer_seed(seed_sequence(Stream.test_subset, seed=seed))
    splitter = StratifiedKFold(n_splits=num_folds, shuffle=True, random_state=random_state)
    return [
        _fold(
            cases, test={patients[i] for i in test_indices}, val_fraction=val_fraction, seed=seed, fold_index=fold_index
        )
        for fold_index, (_, test_indices) in enumerate(splitter.split(patients, strata))
    ]


def all_train(cases: Sequence[CaseRecord], *, val_fraction: float, seed: int) -> list[Fold]:
    """Return one fold without a test part.

    Raises:
        InputError: If there are fewer than two patients.
    """
    _require_patients(patient_volumes(cases), needed=2, purpose="fold=all with a val subset")
    return [_fold(cases, test=set(), val_fraction=val_fraction, seed=seed, fold_index=0)]


def imported(cases: Sequence[CaseRecord], *, file: Path, val_fraction: float, seed: int) -> list[Fold]:
    """Take the test part of each fold from a split file: JSON whose `folds[i].val` lists case ids.

    Ids in the file that are not in the data set are passed over.

    Raises:
        InputError: If the file is not of that form, lacks a case of the data set, or leaves a fold without a part.
    """
    listed = _read_split_file(file)
    known = {case.case_id: case.patient_id for case in cases}
    absent = sorted(set(known) - {case_id for fold in listed for case_id in fold})
    if absent:
        raise InputError(
            f"{file}: {len(absent)} of {len(known)} cases are in no fold: {', '.join(absent[:10])}\n"
            "List them under data.exclude, or use fold=kfold."
        )
    tests = [{known[case_id] for case_id in fold if case_id in known} for fold in listed]
    _require_disjoint(tests, file=file)
    empty = [index for index, test in enumerate(tests) if not test]
    if empty:
        raise InputError(f"{file}: folds {empty} hold none of the {len(known)} cases; use fold=kfold for so few")
    for index, test in enumerate(tests):
        left = {patient: volume for patient, volume in patient_volumes(cases).items() if patient not in test}
        _require_patients(left, needed=2, purpose=f"train and val of fold {index} of {file}")
    return [
        _fold(cases, test=test, val_fraction=val_fraction, seed=seed, fold_index=index)
        for index, test in enumerate(tests)
    ]


def patient_volumes(cases: Sequence[CaseRecord]) -> dict[str, float]:
    """Return each patient's mean gland volume in mL."""
    volumes: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        volumes[case.patient_id].append(case.gland_volume_ml)
    return {patient: float(np.mean(values)) for patient, values in volumes.items()}


def write_folds(path: Path, folds: Sequence[Fold], *, how: Mapping[str, Any]) -> None:
    """Write kfold.json: the parts of every fold, and how they were made."""
    write_json(path, {"how": dict(how), "folds": [fold.parts() for fold in folds]})


def read_folds(path: Path) -> list[Fold]:
    """Read kfold.json.

    Raises:
        InputError: If the file is absent.
    """
    if not path.is_file():
        raise InputError(f"{path} is absent: run stage=prepare first")
    return [Fold(**parts) for parts in read_json(path)["folds"]]


def chosen_folds(folds: Sequence[Fold], *, index: int | None) -> dict[int, Fold]:
    """Return the folds to work on, by index.

    Raises:
        InputError: If there is no fold of that index.
    """
    if index is not None and index >= len(folds):
        raise InputError(f"fold.index: must be below {len(folds)}, the number of folds in kfold.json, is {index}")
    return {number: fold for number, fold in enumerate(folds) if index is None or number == index}


def _fold(cases: Sequence[CaseRecord], *, test: set[str], val_fraction: float, seed: int, fold_index: int) -> Fold:
    """Choose val by patient, stratified by gland volume, from the patients that are not in the test subset."""
    from sklearn.model_selection import train_test_split

    volumes = {patient: volume for patient, volume in patient_volumes(cases).items() if patient not in test}
    patients = sorted(volumes)
    num_val = min(len(patients) - 1, max(1, round(val_fraction * len(patients))))
    num_strata = min(num_val, len(patients) - num_val)  # each stratum has patients in both subsets
    train, val = train_test_split(
        patients,
        test_size=num_val,
        stratify=_volume_strata([volumes[patient] for patient in patients], num_strata=num_strata),
        random_state=integer_seed(seed_sequence(Stream.val_subset, seed=seed, fold_index=fold_index)),
    )
    return Fold(
        **{
            subset: sorted(case.case_id for case in cases if case.patient_id in members)
            for subset, members in (("train", set(train)), ("val", set(val)), ("test", test))
        }
    )


def _volume_strata(volumes: Sequence[float], *, num_strata: int) -> np.ndarray:
    """Return the stratum of each volume, int [N]; strata are ranges of volume whose sizes differ by one at most."""
    ranks = np.argsort(np.argsort(volumes, kind="stable"), kind="stable")
    return ranks * num_strata // len(volumes)


def _require_patients(volumes: Mapping[str, float], *, needed: int, purpose: str) -> None:
    if len(volumes) < needed:
        raise InputError(
            f"{purpose} needs at least {needed} patients, there are {len(volumes)}: {', '.join(sorted(volumes)[:10])}\n"
            "Add patients or lower fold.num_folds. If these are several patients, set data.patient_pattern so that its "
            "first group tells them apart, such as '(.+)' for one study per patient, and run stage=preprocess again."
        )


def _require_disjoint(tests: Sequence[set[str]], *, file: Path) -> None:
    for index, test in enumerate(tests):
        for other in range(index + 1, len(tests)):
            shared = sorted(test & tests[other])
            if shared:
                raise InputError(
                    f"{file}: patient overlap: {', '.join(shared[:10])} in the test parts of folds {index} and {other}\n"
                    "Keep all studies of a patient in one fold."
                )


def _read_split_file(file: Path) -> list[list[str]]:
    try:
        return [[str(case_id) for case_id in fold["val"]] for fold in read_json(file)["folds"]]
    except OSError as error:
        raise InputError(f"fold.file: {file} cannot be read ({error.strerror}); name an existing JSON file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{file}: must be JSON of the form {{"folds": [{{"val": ["case", ...]}}, ...]}}') from error
