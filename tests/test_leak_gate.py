"""The leak gate names what the parts of a fold share, and is silent when they share nothing."""

import pytest

from prostate_seg.data.folds import Fold
from prostate_seg.data.leak_gate import CaseIdentity, find_leaks, stop_on_leaks
from prostate_seg.errors import InputError

FOLDS = [Fold(train=["a_1", "a_2"], val=["b_1"], test=["c_1"])]


def identities(**changes: CaseIdentity) -> dict[str, CaseIdentity]:
    clean = {case: CaseIdentity(patient_id=case[0], image_md5=case) for case in ("a_1", "a_2", "b_1", "c_1")}
    return {**clean, **changes}


def test_clean_folds_pass_with_two_studies_of_a_patient_in_one_part() -> None:
    assert find_leaks(FOLDS, identities=identities()) == []
    stop_on_leaks(FOLDS, identities=identities())


def test_patient_in_train_and_test_is_named() -> None:
    leaky = identities(c_1=CaseIdentity(patient_id="b", image_md5="c_1"))
    with pytest.raises(InputError, match=r"fold 0: patient overlap: b_1 \(val\) and c_1 \(test\)"):
        stop_on_leaks(FOLDS, identities=leaky)


def test_identical_image_files_of_two_patients_are_named() -> None:
    leaky = identities(c_1=CaseIdentity(patient_id="c", image_md5="a_2"))
    with pytest.raises(InputError, match=r"identical image files: a_2 \(train\) and c_1 \(test\)"):
        stop_on_leaks(FOLDS, identities=leaky)


def test_case_that_is_no_longer_in_the_data_set_is_named() -> None:
    known = identities()
    del known["b_1"]
    with pytest.raises(InputError, match="kfold.json names 1 cases that dataset.csv does not have: b_1"):
        stop_on_leaks(FOLDS, identities=known)


def test_many_leaks_are_counted_and_the_first_shown() -> None:
    everyone = [f"x_{i}" for i in range(30)]
    folds = [Fold(train=everyone[:10], val=everyone[10:20], test=everyone[20:])]
    same = {case: CaseIdentity(patient_id="x", image_md5=case) for case in everyone}
    with pytest.raises(InputError, match="the folds leak, 300 pairs of cases") as caught:
        stop_on_leaks(folds, identities=same)
    assert "and 280 more" in str(caught.value)
