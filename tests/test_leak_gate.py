"""The leak gate reports what the subsets of a fold share, by kind, and nothing if they are disjoint."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.folds import Fold
from prostate_seg.data.leak_gate import Check, Fingerprint, find_leaks, stop_on_leaks, unused_pairs
from prostate_seg.imaging.fingerprint import THUMBNAIL_SHAPE

FOLDS = [Fold(train=["a_1", "a_2"], val=["b_1"], test=["c_1"])]


def random_thumbnail(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, THUMBNAIL_SHAPE).astype(np.int8)


def fingerprints(case_id: str = "", **changes: Any) -> dict[str, Fingerprint]:
    clean = {
        case: Fingerprint(
            patient_id=case[0],
            image_md5=f"image {case}",
            mask_md5=f"mask {case}",
            voxels_sha1=f"voxels {case}",
            thumbnail=random_thumbnail(seed),
            oracle_crop=False,
            own_intensities=True,
        )
        for seed, case in enumerate(("a_1", "a_2", "b_1", "c_1"))
    }
    return clean | ({case_id: replace(clean[case_id], **changes)} if case_id else {})


def test_clean_folds_pass_with_two_studies_of_a_patient_in_one_subset() -> None:
    verdict = stop_on_leaks(FOLDS, fingerprints=fingerprints())
    assert verdict.as_dict()["verdict"] == "passed"
    assert set(verdict.as_dict()["checks"].values()) == {"passed"}


def test_duplicates_within_one_subset_are_no_leak() -> None:
    twins = fingerprints("a_2", image_md5="image a_1", voxels_sha1="voxels a_1", thumbnail=random_thumbnail(0))
    assert find_leaks(FOLDS, fingerprints=twins).leaks == []


@pytest.mark.parametrize(
    ("case_id", "changes", "message"),
    [
        ("c_1", {"patient_id": "b"}, r"fold 0: patient overlap \(b\): b_1 \(val\) and c_1 \(test\)"),
        ("c_1", {"image_md5": "image a_2"}, r"fold 0: identical image files: a_2 \(train\) and c_1 \(test\)"),
        ("c_1", {"voxels_sha1": "voxels b_1"}, r"fold 0: identical voxels: b_1 \(val\) and c_1 \(test\)"),
        (
            "c_1",
            {"thumbnail": np.roll(random_thumbnail(0), 1, axis=2)},
            r"fold 0: near-identical images \(correlation 1.00\): a_1 \(train\) and c_1 \(test\)",
        ),
        ("c_1", {"mask_md5": "mask a_1"}, r"fold 0: identical mask files: a_1 \(train\) and c_1 \(test\)"),
        ("b_1", {"own_intensities": False}, r"intensities from outside the study: b_1\n"),
        ("a_1", {"oracle_crop": True}, r"oracle crop: a_1\n"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:30],
)
def test_each_planted_leak_stops_the_run_and_is_reported(case_id: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stop_on_leaks(FOLDS, fingerprints=fingerprints(case_id, **changes))


def test_test_case_in_val_is_reported_as_case_and_not_as_patient() -> None:
    folds = [replace(FOLDS[0], val=["b_1", "c_1"])]
    (leak,) = find_leaks(folds, fingerprints=fingerprints()).leaks
    assert str(leak) == "fold 0: case in two parts: c_1 (val) and c_1 (test)"


NEAR_DUPLICATE = fingerprints("c_1", thumbnail=np.roll(random_thumbnail(0), 1, axis=2))
REASON = {frozenset(("a_1", "c_1")): "two patients"}


def test_accepted_near_duplicate_passes_and_is_recorded_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"'fold.not_duplicates=\[\"10001_1/10002_1: two patients"):
        stop_on_leaks(FOLDS, fingerprints=NEAR_DUPLICATE)
    verdict = stop_on_leaks(FOLDS, fingerprints=NEAR_DUPLICATE, not_duplicates=REASON)
    assert verdict.as_dict()["verdict"] == "passed (1 pair overruled)"
    assert verdict.as_dict()["overruled"] == ["a_1 and c_1 (correlation 1.00): two patients"]
    assert verdict.as_dict()["checks"]["near-identical images"] == "passed (1 pair overruled)"
    assert unused_pairs(REASON, fingerprints=NEAR_DUPLICATE, verdict=verdict) == []


def test_one_accepted_pair_accepts_no_other_pair() -> None:
    other = NEAR_DUPLICATE | {"b_1": replace(NEAR_DUPLICATE["b_1"], thumbnail=random_thumbnail(1))}
    with pytest.raises(InputError, match=r"near-identical images \(correlation 1.00\): a_2 \(train\) and b_1 \(val\)"):
        stop_on_leaks(FOLDS, fingerprints=other, not_duplicates=REASON)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"patient_id": "a"}, "patient overlap"),
        ({"image_md5": "image a_1"}, "identical image files"),
        ({"voxels_sha1": "voxels a_1"}, "identical voxels"),
        ({"mask_md5": "mask a_1"}, "identical mask files"),
    ],
)
def test_pair_that_shares_more_than_near_identical_images_is_not_accepted(changes: dict[str, Any], check: str) -> None:
    known = fingerprints("c_1", thumbnail=random_thumbnail(0), **changes)
    with pytest.raises(InputError, match="a_1"):
        stop_on_leaks(FOLDS, fingerprints=known, not_duplicates=REASON)
    verdict = find_leaks(FOLDS, fingerprints=known, not_duplicates=REASON)
    assert verdict.overruled == {}
    (text,) = unused_pairs(REASON, fingerprints=known, verdict=verdict)
    assert text.startswith("a_1/c_1: they share more than near-identical images (")
    assert check in text


def test_pair_without_effect_is_reported_with_the_cause() -> None:
    verdict = find_leaks(FOLDS, fingerprints=fingerprints(), not_duplicates=REASON)
    pairs = REASON | {frozenset(("a_1", "c_l")): "typing error", frozenset(("a_1",)): "one"}
    pairs |= {frozenset(("a_1", "ancestor-0123456789ab")): "two patients"}  # for the gate on ancestors
    assert verdict.as_dict()["verdict"] == "passed"
    assert unused_pairs(pairs, fingerprints=fingerprints(), verdict=verdict) == [
        "a_1/c_1: their images are not near-identical; remove the pair",
        "a_1/c_l: c_l is no case of this data set; did you mean c_1?",
        "a_1: a pair is two cases, and this is one",
    ]


def test_duplicate_is_reported_once_by_the_first_check_that_finds_it() -> None:
    copy = fingerprints(
        "c_1", patient_id="a", image_md5="image a_1", voxels_sha1="voxels a_1", thumbnail=random_thumbnail(0)
    )
    leaks = find_leaks(FOLDS, fingerprints=copy).leaks
    assert [(leak.check, leak.first) for leak in leaks] == [
        (Check.patient, "a_1 (train)"),
        (Check.patient, "a_2 (train)"),
    ]


def test_requested_oracle_crop_is_recorded_and_does_not_stop_the_run() -> None:
    verdict = stop_on_leaks(FOLDS, fingerprints=fingerprints("a_1", oracle_crop=True), allowed=[Check.oracle_crop])
    assert verdict.as_dict()["verdict"] == "leaks: oracle crop"


def test_check_with_unknown_attributes_is_not_reported_as_passed() -> None:
    names_alone = {case: Fingerprint(patient_id=case[0]) for case in fingerprints()}
    checks = find_leaks(FOLDS, fingerprints=names_alone | {"a_1": fingerprints()["a_1"]}).as_dict()["checks"]
    assert checks["patient overlap"] == "passed"
    assert checks["near-identical images"] == "passed on 1 of 4 cases"
    assert find_leaks(FOLDS, fingerprints=names_alone).as_dict()["checks"]["identical voxels"] == "not run"


def test_case_that_is_no_longer_in_the_data_set_is_reported() -> None:
    known = fingerprints()
    del known["b_1"]
    with pytest.raises(InputError, match="kfold.json names 1 cases that dataset.csv does not have: b_1"):
        stop_on_leaks(FOLDS, fingerprints=known)


def test_many_leaks_are_counted_and_the_first_shown() -> None:
    everyone = [f"x_{i}" for i in range(30)]
    folds = [Fold(train=everyone[:10], val=everyone[10:20], test=everyone[20:])]
    same = {case: Fingerprint(patient_id="x") for case in everyone}
    with pytest.raises(InputError, match="the folds leak") as caught:
        stop_on_leaks(folds, fingerprints=same)
    assert "and 280 more" in str(caught.value)
