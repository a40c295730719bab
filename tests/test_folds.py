"""Folds: patients are not divided, each is tested once, volumes are balanced, impossible folds and split files are refused."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.dataset import CaseRecord
from prostate_seg.data.folds import (
    Fold,
    all_train,
    chosen_folds,
    group_names,
    groups,
    imported,
    kfold,
    read_folds,
    read_splits,
    with_max_train_cases,
    write_folds,
)
from tests.data_helpers import case_record


def cases(num_patients: int, *, second_studies: int = 0) -> list[CaseRecord]:
    return [
        case_record(f"p{i:03d}_{study}", gland_volume_ml=20.0 + i)
        for i in range(num_patients)
        for study in range(2 if i < second_studies else 1)
    ]


def patients(case_ids: list[str]) -> set[str]:
    return {case_id.split("_")[0] for case_id in case_ids}


@pytest.mark.parametrize(("num_patients", "num_folds"), [(4, 2), (3, 3), (8, 2), (23, 5), (100, 10)])
def test_every_patient_is_tested_once_and_subsets_are_disjoint(num_patients: int, num_folds: int) -> None:
    everyone = cases(num_patients, second_studies=num_patients // 2)
    folds = kfold(everyone, num_folds=num_folds, val_fraction=0.2, seed=0)
    assert sorted(case for fold in folds for case in fold.test) == sorted(case.case_id for case in everyone)
    for fold in folds:
        parts = [patients(part) for part in fold.subsets().values()]
        assert all(parts)
        assert sum(len(part) for part in parts) == num_patients
        assert set.union(*parts) == {case.patient_id for case in everyone}


def test_fold_sizes_differ_by_one_patient_at_most() -> None:
    sizes = [len(fold.test) for fold in kfold(cases(23), num_folds=5, val_fraction=0.2, seed=1)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]


def test_gland_volumes_are_balanced_better_than_at_random() -> None:
    everyone = cases(100)
    volume = {case.case_id: case.gland_volume_ml for case in everyone}
    folds = kfold(everyone, num_folds=5, val_fraction=0.2, seed=0)
    for part in ("test", "val"):
        means = [np.mean([volume[case] for case in fold.subsets()[part]]) for fold in folds]
        assert np.ptp(means) < 8  # a shuffled split of 20 out of 20..119 mL has an SD of 6 and a range of 15


def test_same_seed_same_folds_other_seed_other_folds() -> None:
    first, again, other = (kfold(cases(20), num_folds=4, val_fraction=0.2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_order_of_cases_does_not_matter() -> None:
    everyone = cases(12, second_studies=3)
    assert kfold(everyone, num_folds=3, val_fraction=0.2, seed=0) == kfold(
        everyone[::-1], num_folds=3, val_fraction=0.2, seed=0
    )


@pytest.mark.parametrize(("num_patients", "num_folds", "needed"), [(3, 2, 4), (2, 3, 3), (4, 5, 5), (1, 2, 4)])
def test_too_few_patients_are_refused_with_the_numbers(num_patients: int, num_folds: int, needed: int) -> None:
    with pytest.raises(InputError, match=f"needs at least {needed} patients, there are {num_patients}"):
        kfold(cases(num_patients), num_folds=num_folds, val_fraction=0.2, seed=0)


def test_strategy_all_trains_on_all_but_val_and_has_no_test_patients() -> None:
    (fold,) = all_train(cases(10), val_fraction=0.1, seed=0)
    assert (len(fold.train), len(fold.val), fold.test) == (9, 1, [])
    with pytest.raises(InputError, match="needs at least 2 patients, there are 1"):
        all_train(cases(1), val_fraction=0.1, seed=0)


def split_file(path: Path, *tests: list[str]) -> Path:
    path.write_text(json.dumps({"folds": [{"val": test} for test in tests]}))
    return path


def test_imported_file_defines_the_test_patients(tmp_path: Path) -> None:
    file = split_file(tmp_path / "s.json", ["p000_0", "p001_0", "absent_1"], ["p002_0", "p003_0"])
    folds = imported(cases(4), file=file, val_fraction=0.3, seed=0)
    assert [fold.test for fold in folds] == [["p000_0", "p001_0"], ["p002_0", "p003_0"]]
    assert all(fold.train and fold.val for fold in folds)


def test_imported_file_that_splits_a_patient_is_refused(tmp_path: Path) -> None:
    file = split_file(tmp_path / "s.json", ["p000_0", "p001_0"], ["p000_1", "p002_0", "p003_0"])
    with pytest.raises(InputError, match="patient overlap: p000 in the test subsets of folds 0 and 1"):
        imported(cases(4, second_studies=1), file=file, val_fraction=0.3, seed=0)


def test_refusal_of_a_split_file_names_ten_cases_and_counts_the_rest(tmp_path: Path) -> None:
    file = split_file(tmp_path / "s.json", ["p000_0"], ["p001_0"])
    with pytest.raises(InputError, match="13 of 15 cases are in no fold: p002_0, .*, p011_0 and 3 more"):
        imported(cases(15), file=file, val_fraction=0.3, seed=0)


def test_imported_file_that_lacks_a_case_or_a_fold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 4 cases are in no fold: p003_0"):
        imported(cases(4), file=split_file(tmp_path / "a", ["p000_0", "p001_0"], ["p002_0"]), val_fraction=0.3, seed=0)
    empty = split_file(tmp_path / "b", ["p000_0", "p001_0", "p002_0", "p003_0"], [])
    with pytest.raises(InputError, match=r"folds \[1\] hold none of the 4 cases"):
        imported(cases(4), file=empty, val_fraction=0.3, seed=0)


@pytest.mark.parametrize("text", ["{", "[]", '{"folds": [{"test": []}]}', '{"folds": 3}'])
def test_file_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(InputError, match="a split file is JSON of one of these forms"):
        imported(cases(4), file=tmp_path / "s.json", val_fraction=0.3, seed=0)


def test_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        imported(cases(4), file=tmp_path / "s.json", val_fraction=0.3, seed=0)


def grouped(values: dict[str, str]) -> list[CaseRecord]:
    return [replace(case_record(case_id), attributes={"centre": centre}) for case_id, centre in values.items()]


def test_each_group_is_tested_once_by_folds_that_contain_none_of_it() -> None:
    everyone = grouped({"a_1": "north", "a_2": "north", "b_1": "south", "c_1": "north", "d_1": "east", "e_1": "east"})
    folds = groups(everyone, column="centre", val_fraction=0.3, seed=0)
    assert group_names(everyone, column="centre") == ["east", "north", "south"]
    assert [fold.test for fold in folds] == [["d_1", "e_1"], ["a_1", "a_2", "c_1"], ["b_1"]]
    for fold in folds:
        assert fold.train
        assert fold.val
        assert sorted(fold.train + fold.val + fold.test) == sorted(case.case_id for case in everyone)
        assert not patients(fold.val) & patients(fold.train)


@pytest.mark.parametrize(
    ("values", "column", "message"),
    [
        ({"a_1": "x", "b_1": "y"}, "site", "fold.column=site: .* has no such column; it has centre\nName one"),
        ({"a_1": "x", "b_1": ""}, "centre", "1 of 2 cases have no value: b_1\nAdd the values"),
        ({"a_1": "x", "b_1": "x"}, "centre", "must have at least two values, has x alone; use fold=kfold"),
        ({"a_1": "x", "a_2": "y", "b_1": "y"}, "centre", "patient overlap: a in the groups x and y"),
        ({"a_1": "x", "b_1": "y", "c_1": "y"}, "centre", "the fold that tests centre y needs at least 2 patients"),
    ],
)
def test_groups_that_cannot_be_tested_are_refused(values: dict[str, str], column: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        groups(grouped(values), column=column, val_fraction=0.2, seed=0)


def test_official_picai_folds_keep_the_patients_of_1500_studies_together(shared_data: Path) -> None:
    official = json.loads((shared_data / "picai_folds.json").read_text())["folds"]
    everyone = [case_record(case_id, gland_volume_ml=50.0) for fold in official for case_id in fold["val"]]
    folds = imported(everyone, file=shared_data / "picai_folds.json", val_fraction=0.2, seed=0)
    assert [len(fold.test) for fold in folds] == [len(fold["val"]) for fold in official]
    assert len({case.patient_id for case in everyone}) == 1476
    assert not any(patients(fold.test) & patients(fold.train + fold.val) for fold in folds)


def test_folds_round_trip_through_the_file(tmp_path: Path) -> None:
    folds = [Fold(train=["a"], val=["b"], test=["c"])]
    write_folds(tmp_path / "kfold.json", folds, how={"strategy": "kfold"})
    assert read_folds(tmp_path / "kfold.json") == folds


def test_absent_kfold_and_fold_index_are_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run stage=prepare first"):
        read_folds(tmp_path / "kfold.json")
    with pytest.raises(InputError, match="must be below 1, the number of folds in kfold.json, is 3"):
        chosen_folds([Fold(train=["a"], val=["b"], test=["c"])], index=3)


@pytest.mark.parametrize("text", ['{"folds": [{"train": ["a"]', "[]", '{"folds": [{"train": ["a"], "val": ["b"]}]}'])
def test_kfold_that_was_edited_into_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "kfold.json").write_text(text)
    with pytest.raises(InputError, match="must have the form that stage=prepare writes"):
        read_folds(tmp_path / "kfold.json")


def test_fewer_training_cases_are_among_more_of_them_and_other_subsets_stay() -> None:
    fold = kfold(cases(20), num_folds=4, val_fraction=0.2, seed=0)[1]

    def limited(max_cases: int | None, *, seed: int = 0, fold_index: int = 1) -> Fold:
        return with_max_train_cases(fold, max_cases=max_cases, seed=seed, fold_index=fold_index)

    sizes = [2, 4, 8]
    chosen = [limited(size) for size in sizes]
    assert [len(one.train) for one in chosen] == sizes
    assert set(chosen[0].train) < set(chosen[1].train) < set(chosen[2].train) < set(fold.train)
    assert all((one.val, one.test) == (fold.val, fold.test) for one in chosen)
    assert limited(None) == limited(len(fold.train)) == limited(1000) == fold
    assert limited(4) == limited(4)
    assert limited(4).train not in (limited(4, seed=1).train, limited(4, fold_index=0).train)


@pytest.mark.parametrize(
    ("content", "folds"),
    [
        (
            {"how": {}, "folds": [{"train": ["a"], "val": ["b"], "test": ["c"]}]},
            [Fold(train=["a"], val=["b"], test=["c"])],
        ),
        (
            [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}],
            [Fold(train=["a", "b"], val=["c"], test=[]), Fold(train=["c"], val=["a", "b"], test=[])],
        ),
        (
            {"folds": [{"val": ["a"]}, {"val": ["b"]}]},
            [Fold(train=["b"], val=[], test=["a"]), Fold(train=["a"], val=[], test=["b"])],
        ),
        (
            {"train": ["x/a_0000.nii.gz"], "validation": ["b.mha"], "test": ["c"], "name": "mine"},
            [Fold(train=["a_0000"], val=["b"], test=["c"])],
        ),
    ],
    ids=["kfold.json", "nnU-Net", "PI-CAI", "plain"],
)
def test_known_formats_of_split_files_are_read(tmp_path: Path, content: Any, folds: list[Fold]) -> None:
    (tmp_path / "splits.json").write_text(json.dumps(content))
    assert read_splits(tmp_path / "splits.json") == folds


@pytest.mark.parametrize("content", ["3", '"a"', "{}", "[]", '{"folds": [{"val": "abc"}]}', '[["a"], ["b"]]', "{oops"])
def test_other_files_are_no_split_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(InputError, match="a split file is JSON of one of these forms"):
        read_splits(tmp_path / "splits.json")


def test_pickle_is_not_opened_and_an_absent_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "splits_final.pkl").write_bytes(pickle.dumps([{"train": ["a"], "val": ["b"]}]))
    with pytest.raises(InputError, match="is no JSON"):
        read_splits(tmp_path / "splits_final.pkl")
    with pytest.raises(InputError, match="No such file"):
        read_splits(tmp_path / "absent.json")
