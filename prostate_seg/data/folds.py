"""Folds: division of the patients into train, val and test subsets, and files that list them.

All studies of a patient are in one subset. Subsets are sorted lists of case ids.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.files import read_json, write_json
from prostate_seg.common.seeds import Stream, integer_seed, seed_sequence
from prostate_seg.data.dataset import CaseRecord
from prostate_seg.imaging.sitk_reader import image_stem

FORMS = (
    'JSON of one of these forms: {"folds": [{"train": [...], "val": [...], "test": [...]}, ...]}, the same with val alone '
    '(PI-CAI), a list of {"train": [...], "val": [...]} (nnU-Net), or {"train": [...], "val": [...], "test": [...]}'
)

SUBSETS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""Subset by the names that split files use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Case ids of one fold."""

    train: list[str]
    """Fit the weights."""
    val: list[str]
    """Choose the checkpoint."""
    test: list[str]
    """Measured once, at the end; empty for a final model."""

    def subsets(self) -> dict[str, list[str]]:
        """Return the subsets by name."""
        return asdict(self)


def kfold(cases: Sequence[CaseRecord], *, num_folds: int, val_fraction: float, seed: int) -> list[Fold]:
    """Divide the patients for cross-validation, so that every patient is in the test subset of exactly one fold.

    Test subsets differ by one patient at most and have similar gland volumes.

    Raises:
        InputError: If there are too few patients.
    """
    from sklearn.model_selection import StratifiedKFold  # takes a second to import; most stages only read folds

    volumes = patient_volumes(cases)
    # Two patients must be left outside the largest test subset: one to train and one for val.
    needed = 4 if num_folds == 2 else num_folds
    _require_patients(volumes, needed=needed, purpose=f"fold.num_folds={num_folds} with a val subset")
    # A patient is one sample however many studies it has, so that folds are grouped by patient and equal in patients, which
    # StratifiedGroupKFold over studies does not promise. The finest strata that still reach every fold balance best.
    patients = sorted(volumes)
    strata = _volume_strata([volumes[patient] for patient in patients], num_strata=len(patients) // num_folds)
    random_state = integer_seed(seed_sequence(Stream.test_subset, seed=seed))
    splitter = StratifiedKFold(n_splits=num_folds, shuffle=True, random_state=random_state)
    tests = [{patients[index] for index in indices} for _, indices in splitter.split(patients, strata)]
    return _with_val(cases, tests, val_fraction=val_fraction, seed=seed)


def all_train(cases: Sequence[CaseRecord], *, val_fraction: float, seed: int) -> list[Fold]:
    """Return one fold without a test subset.

    Raises:
        InputError: If there are fewer than two patients.
    """
    _require_patients(patient_volumes(cases), needed=2, purpose="fold=all with a val subset")
    return _with_val(cases, [set()], val_fraction=val_fraction, seed=seed)


def imported(cases: Sequence[CaseRecord], *, file: Path, val_fraction: float, seed: int) -> list[Fold]:
    """Take the test subset of each fold from a split file whose folds list it as `val`, as PI-CAI's do.

    Ids in the file that are not in the data set are ignored.

    Raises:
        InputError: If the file is not of that form, lacks a case of the data set, or leaves a fold without a subset.
    """
    named = [subsets.get("val") for subsets in _read_subsets(file)]
    patient_of = {case.case_id: case.patient_id for case in cases}
    absent = sorted(set(patient_of) - {case_id for fold in named for case_id in fold or []})
    if None in named:
        raise InputError(f"{file}: every fold must list its test cases as val; a split file is {FORMS}")
    if absent:
        raise InputError(
            f"{file}: {len(absent)} of {len(patient_of)} cases are in no fold: {listed(absent, most=10)}\n"
            "List them under data.exclude, or use fold=kfold."
        )
    tests = [{patient_of[case_id] for case_id in fold or [] if case_id in patient_of} for fold in named]
    for (first, one), (second, other) in combinations(enumerate(tests), 2):
        if shared := sorted(one & other):
            raise InputError(
                f"{file}: patient overlap: {listed(shared, most=10)} in the test subsets of folds {first} and {second}\n"
                "Keep all studies of a patient in one fold."
            )
    if empty := [index for index, test in enumerate(tests) if not test]:
        raise InputError(f"{file}: folds {empty} hold none of the {len(patient_of)} cases; use fold=kfold for so few")
    for index, test in enumerate(tests):
        _require_patients(set(patient_of.values()) - test, needed=2, purpose=f"train and val of fold {index} of {file}")
    return _with_val(cases, tests, val_fraction=val_fraction, seed=seed)


def groups(cases: Sequence[CaseRecord], *, column: str, val_fraction: float, seed: int) -> list[Fold]:
    """Test each value of a column of cases.csv, such as a centre, in a fold of its own, by the order of `group_names`.

    Raises:
        InputError: If there is no such column, a case has no value, a patient has several, or groups or patients are too few.
    """
    names = group_names(cases, column=column)
    patients_of = {name: {case.patient_id for case in cases if case.attributes[column] == name} for name in names}
    for (first, one), (second, other) in combinations(patients_of.items(), 2):
        if shared := sorted(one & other):
            raise InputError(
                f"fold.column={column}: patient overlap: {listed(shared, most=10)} in the groups {first} and {second}\n"
                "A network tested on one of them would have seen the patient: give all studies of a patient one group."
            )
    everyone = set().union(*patients_of.values())
    for name, test in patients_of.items():
        purpose = f"train and val of the fold that tests {column} {name}"
        _require_patients(everyone - test, needed=2, purpose=purpose)
    return _with_val(cases, list(patients_of.values()), val_fraction=val_fraction, seed=seed)


def group_names(cases: Sequence[CaseRecord], *, column: str) -> list[str]:
    """Return the values of a column of cases.csv, sorted.

    Raises:
        InputError: If there is no such column, a case has no value, or there is a single value.
    """
    columns = sorted({name for case in cases for name in case.attributes})
    if column not in columns:
        raise InputError(
            f"fold.column={column}: cases.csv of the data folder has no such column; it has {', '.join(columns) or 'none'}\n"
            "Name one of them, or add the column and run stage=preprocess again."
        )
    unknown = sorted(case.case_id for case in cases if not case.attributes.get(column))
    if unknown:
        raise InputError(
            f"fold.column={column}: {len(unknown)} of {len(cases)} cases have no value: {listed(unknown, most=10)}\n"
            "Add the values to cases.csv, or list the cases under data.exclude, and run stage=preprocess again."
        )
    names = sorted({case.attributes[column] for case in cases})
    if len(names) < 2:
        raise InputError(f"fold.column={column}: must have at least two values, has {names[0]} alone; use fold=kfold")
    return names


def with_max_train_cases(fold: Fold, *, max_cases: int | None, seed: int, fold_index: int) -> Fold:
    """Return a fold with at most a number of its training cases; those of a smaller number are among those of a larger one."""
    if max_cases is None or max_cases >= len(fold.train):
        return fold
    order = np.random.default_rng(seed_sequence(Stream.train_subset, seed=seed, fold_index=fold_index))
    chosen = order.permutation(sorted(fold.train))[:max_cases]
    return replace(fold, train=sorted(map(str, chosen)))


def patient_volumes(cases: Sequence[CaseRecord]) -> dict[str, float]:
    """Return each patient's mean gland volume in mL."""
    volumes: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        volumes[case.patient_id].append(case.gland_volume_ml)
    return {patient: float(np.mean(values)) for patient, values in volumes.items()}


def _with_val(cases: Sequence[CaseRecord], tests: Sequence[set[str]], *, val_fraction: float, seed: int) -> list[Fold]:
    """Choose val by patient, stratified by gland volume, from the patients that are not in each test subset."""
    from sklearn.model_selection import train_test_split

    volumes, folds = patient_volumes(cases), []
    for fold_index, test in enumerate(tests):
        patients = sorted(set(volumes) - test)
        num_val = min(len(patients) - 1, max(1, round(val_fraction * len(patients))))
        num_strata = min(num_val, len(patients) - num_val)  # each stratum has patients in both subsets
        train, val = train_test_split(
            patients,
            test_size=num_val,
            stratify=_volume_strata([volumes[patient] for patient in patients], num_strata=num_strata),
            random_state=integer_seed(seed_sequence(Stream.val_subset, seed=seed, fold_index=fold_index)),
        )
        train_ids, val_ids, test_ids = (
            sorted(case.case_id for case in cases if case.patient_id in subset) for subset in (train, val, test)
        )
        folds.append(Fold(train=train_ids, val=val_ids, test=test_ids))
    return folds


def _volume_strata(volumes: Sequence[float], *, num_strata: int) -> np.ndarray:
    """Return the stratum of each volume, int [N]; strata are ranges of volume whose sizes differ by one at most."""
    ranks = np.argsort(np.argsort(volumes, kind="stable"), kind="stable")
    return ranks * num_strata // len(volumes)


def _require_patients(patients: Collection[str], *, needed: int, purpose: str) -> None:
    if len(patients) < needed:
        raise InputError(
            f"{purpose} needs at least {needed} patients, there are {len(patients)}: {listed(sorted(patients), most=10)}\n"
            "Add patients or lower fold.num_folds. If these are several patients, set data.patient_pattern so that its "
            "first group tells them apart, such as '(.+)' for one study per patient, and run stage=preprocess again."
        )


def write_folds(path: Path, folds: Sequence[Fold], *, how: Mapping[str, Any]) -> None:
    """Write kfold.json: the subsets of every fold, and the settings that they were made with."""
    write_json(path, {"how": dict(how), "folds": [fold.subsets() for fold in folds]})


def read_folds(path: Path) -> list[Fold]:
    """Read kfold.json.

    Raises:
        InputError: If it is absent, or was edited and has another form.
    """
    if not path.is_file():
        raise InputError(f"{path} is absent: run stage=prepare first")
    try:
        return [Fold(**subsets) for subsets in read_json(path)["folds"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} must have the form that stage=prepare writes ({error}): correct it, or run stage=prepare again"
        ) from error


def chosen_folds(folds: Sequence[Fold], *, index: int | None) -> dict[int, Fold]:
    """Return the fold of one index, or all folds if it is None, by index.

    Raises:
        InputError: If there is no fold of that index.
    """
    if index is not None and index >= len(folds):
        raise InputError(f"fold.index: must be below {len(folds)}, the number of folds in kfold.json, is {index}")
    return {number: fold for number, fold in enumerate(folds) if index is None or number == index}


def read_splits(path: Path) -> list[Fold]:
    """Read the folds of kfold.json, PI-CAI's folds, nnU-Net's splits_final.json, or a single split.

    Folds that list val alone, as PI-CAI's do, test on it and train on what the other folds test.

    Raises:
        InputError: If the file cannot be read or has none of the known forms.
    """
    folds = _read_subsets(path)
    if all(set(subsets) == {"val"} for subsets in folds):
        tests = [subsets["val"] for subsets in folds]
        others = [{case_id for other in tests if other is not test for case_id in other} for test in tests]
        folds = [{"train": sorted(train), "test": test} for train, test in zip(others, tests, strict=True)]
    return [Fold(**{subset: subsets.get(subset, []) for subset in ("train", "val", "test")}) for subsets in folds]


def _read_subsets(path: Path) -> list[dict[str, list[str]]]:
    """Return the subsets of each fold in a split file by name, image suffixes dropped from the case ids."""
    try:
        content = read_json(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name an existing split file") from error
    except ValueError as error:  # also a pickle, which is not opened: it could run any code
        raise InputError(f"{path} is no JSON: a split file is {FORMS}") from error
    folds = []
    try:
        for entry in content if isinstance(content, list) else content.get("folds", [content]):
            subsets = {SUBSETS[name]: entry[name] for name in entry if name in SUBSETS}
            if not subsets or any(isinstance(names, str) for names in subsets.values()):
                raise KeyError("train, val, test")
            folds.append(
                {subset: [image_stem(Path(str(name)).name) for name in names] for subset, names in subsets.items()}
            )
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: a split file is {FORMS}") from error
    if not any(case_ids for subsets in folds for case_ids in subsets.values()):
        raise InputError(f"{path} lists no case; a split file is {FORMS}")
    return folds
