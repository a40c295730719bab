"""Lineage of networks: what its files hold, and the gate that refuses val and test cases which an ancestor has seen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of
from prostate_seg.data.folds import Fold
from prostate_seg.data.leak_gate import Fingerprint, Verdict
from prostate_seg.data.lineage import (
    Ancestor,
    Lineage,
    as_ancestors,
    find_ancestor_leaks,
    outcome,
    read_lineage,
    write_lineage,
)
from prostate_seg.imaging.fingerprint import packed_thumbnails, unpacked_thumbnails
from prostate_seg.steps.leak_gate import ancestors_in, pass_ancestor_gate
from tests.test_leak_gate import random_thumbnail

PASSED = {"verdict": "passed", "checks": {"identical voxels": "passed"}, "overruled": []}


def study(number: int, **changes: Any) -> Fingerprint:
    values = {
        "patient_id": f"patient{number}",
        "image_md5": f"image{number}",
        "mask_md5": f"mask{number}",
        "voxels_sha1": f"{number:x}".ljust(40, "0"),
        "thumbnail": random_thumbnail(number),
    }
    return Fingerprint(**{**values, **changes})


def ancestor(*, train: tuple[int, ...] = (1, 2), val: tuple[int, ...] = (3,), name: str = "A") -> Ancestor:
    network = Ancestor(weights_md5=f"{name}0123456789", source=f"models:/{name}@champion", version=None, run_id=None)
    return replace(network, train=tuple(map(study, train)), val=tuple(map(study, val)))


UNKNOWN = replace(ancestor(name="old"), train=None, val=None)


def gate(case: Fingerprint, *ancestors: Ancestor, subset: str = "test", **how: Any) -> Verdict:
    return find_ancestor_leaks(ancestors, fingerprints={"c_1": case}, **{subset: ["c_1"]}, **how)  # type: ignore[arg-type]


def test_files_hold_each_study_once_without_ids_and_round_trip(tmp_path: Path) -> None:
    parent = as_ancestors(ancestor(train=(), val=()), Lineage(train=(study(1),), val=(study(2),), ancestors=(UNKNOWN,)))
    lineage = Lineage(train=(study(1), study(3)), val=(study(4),), ancestors=parent)
    write_lineage(tmp_path, lineage)
    text = (tmp_path / "lineage.json").read_text()
    assert "patient" not in text
    assert text.count('"image1"') == 1
    found = read_lineage(tmp_path)
    assert found is not None
    assert [one.image_md5 for one in (*found.train, *found.val)] == ["image1", "image3", "image4"]
    assert [(one.source, one.train is None, len(one.studies)) for one in found.ancestors] == [
        ("models:/A@champion", False, 2),
        ("models:/old@champion", True, 0),
    ]
    first = found.train[0].thumbnail
    assert first is not None
    assert np.corrcoef(first.ravel(), random_thumbnail(1).ravel())[0, 1] > 0.99
    before = md5_of(tmp_path)
    write_lineage(tmp_path, found)
    assert md5_of(tmp_path) == before


def test_packed_thumbnails_keep_every_level_of_fifteen() -> None:
    values = np.zeros((2, 16, 50, 50), np.int8)
    values.reshape(2, -1)[:, :15] = np.arange(-7, 8) * 18
    np.testing.assert_array_equal(unpacked_thumbnails(packed_thumbnails(list(values))), values)
    extremes = np.full((1, 16, 50, 50), -127, np.int8)
    assert abs(int(unpacked_thumbnails(packed_thumbnails(list(extremes)))[0, 0, 0, 0]) + 127) <= 9


def test_lineage_without_thumbnails_is_read_and_a_damaged_one_refused(tmp_path: Path) -> None:
    assert read_lineage(tmp_path) is None
    write_lineage(tmp_path, Lineage(train=(study(1),), val=(study(2),)))
    whole = (tmp_path / "lineage.npz").read_bytes()
    (tmp_path / "lineage.npz").unlink()
    found = read_lineage(tmp_path)
    assert found is not None
    assert found.train[0].thumbnail is None
    (tmp_path / "lineage.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is damaged"):
        read_lineage(tmp_path)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"image_md5": "image1"}, "identical image files: ancestor-100000000000 (train) and c_1 (test)"),
        ({"voxels_sha1": "1".ljust(40, "0")}, "identical voxels: ancestor-100000000000 (train) and c_1 (test)"),
        ({"mask_md5": "mask1"}, "identical mask files: ancestor-100000000000 (train) and c_1 (test)"),
        (
            {"thumbnail": np.roll(random_thumbnail(1), 1, axis=2)},
            "near-identical images (correlation 0.99): ancestor-100000000000 (train) and c_1 (test)",
        ),
    ],
)
def test_test_case_that_an_ancestor_was_trained_on_is_found(changes: dict[str, Any], check: str) -> None:
    (leak,) = gate(study(9, **changes), ancestor(train=(1,), val=())).leaks
    assert str(leak).replace("1.00", "0.99") == check


def test_unseen_case_and_equal_patient_ids_of_two_sites_are_no_leak() -> None:
    assert gate(study(9), ancestor()).leaks == []
    assert gate(study(9, patient_id="patient1"), ancestor()).leaks == []


def test_val_study_of_an_ancestor_may_be_val_again_and_is_refused_in_test() -> None:
    seen = study(9, image_md5="image3")
    assert gate(seen, ancestor(), subset="val").leaks == []
    assert len(gate(seen, ancestor(), subset="test").leaks) == 1
    assert len(gate(seen, ancestor(), ancestor(train=(3,), val=(), name="B"), subset="val").leaks) == 1


def test_studies_that_ancestors_share_are_no_leak() -> None:
    assert gate(study(9), ancestor(train=(1,), val=(3,)), ancestor(train=(3,), val=(1,), name="B")).leaks == []


def test_accepted_near_duplicate_of_an_ancestors_study_passes() -> None:
    seen, parent = study(9, thumbnail=random_thumbnail(15)), ancestor(train=(15,), val=())
    pairs = {frozenset(("c_1", "ancestor-f00000000000")): "two patients"}
    assert len(gate(seen, parent).leaks) == 1
    found = gate(seen, parent, not_duplicates=pairs)
    assert found.leaks == []
    assert list(found.overruled.values()) == ["ancestor-f00000000000 and c_1 (correlation 1.00): two patients"]
    same_file = replace(seen, image_md5="image15")
    assert len(gate(same_file, parent, not_duplicates=pairs).leaks) == 1


def test_refusal_names_case_ancestor_and_next_step() -> None:
    fold = Fold(train=[], val=[], test=["c_1"])
    parents = (ancestor(name="B"), ancestor(train=(9,)))
    with pytest.raises(InputError) as caught:
        pass_ancestor_gate({"fold 0": (fold, parents)}, PASSED, fingerprints={"c_1": study(9)}, not_duplicates={})
    text = str(caught.value)
    assert (
        "fold 0: its initial weights, or weights that those started from, were trained on its val or test cases" in text
    )
    assert "identical image files: ancestor-900000000000 (train) and c_1 (test)" in text
    assert "Start from weights that were not trained on them" in text


def test_unknown_studies_of_an_ancestor_never_pass(caplog: pytest.LogCaptureFixture) -> None:
    fold, cases = Fold(train=[], val=[], test=["c_1"]), {"c_1": study(9)}
    folds = {"fold 0": (fold, (ancestor(), UNKNOWN))}
    verdict = pass_ancestor_gate(folds, PASSED, fingerprints=cases, not_duplicates={})
    assert verdict["verdict"] == "unknown: studies of ancestors"
    assert verdict["checks"]["studies of ancestors"].startswith(
        "unknown: the studies of models:/old@champion (weights old01234)"
    )
    assert "the leak gate cannot check" in caplog.text
    oracle = pass_ancestor_gate(
        folds, {**PASSED, "verdict": "leaks: oracle crop"}, fingerprints=cases, not_duplicates={}
    )
    assert oracle["verdict"] == "leaks: oracle crop; unknown: studies of ancestors"
    known = pass_ancestor_gate({"fold 0": (fold, (ancestor(),))}, PASSED, fingerprints=cases, not_duplicates={})
    assert (known["verdict"], known["checks"]["studies of ancestors"]) == ("passed", "passed (3 studies of 1 network)")
    assert pass_ancestor_gate({"fold 0": (fold, ())}, PASSED, fingerprints=cases, not_duplicates={}) == PASSED


def test_studies_known_by_hashes_alone_are_counted() -> None:
    bare = ancestor()
    bare = replace(bare, train=tuple(replace(one, thumbnail=None) for one in bare.train or ()))
    assert outcome([bare]) == "passed (3 studies of 1 network, 2 of them by hashes alone)"


def test_network_with_initial_weights_and_without_lineage_has_unknown_ancestors(tmp_path: Path) -> None:
    assert ancestors_in(tmp_path) == ()
    (tmp_path / "config.yaml").write_text("train: {loss: dice}")
    assert ancestors_in(tmp_path) == ()  # an earlier version
    (tmp_path / "config.yaml").write_text("train: {init: 'models:/x/1'}")
    (parent,) = ancestors_in(tmp_path)
    assert (parent.source, parent.train) == ("models:/x/1", None)
