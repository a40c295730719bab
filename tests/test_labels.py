"""Mask labels: whole numbers are accepted, anything else is refused with the value and the next step."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from prostate_seg.data.cases import Case
from prostate_seg.data.loading import load_case, read_mask
from prostate_seg.imaging.geometry import Finding, Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.imaging.labels import as_labels, label_problem
from prostate_seg.imaging.preprocessing import preprocess_study
from tests.imaging_helpers import DEFAULT

GRID = Geometry(
    shape_vox=(10, 40, 40),
    spacing_mm=(3.0, 1.0, 1.0),
    origin_mm=(0.0, 0.0, 0.0),
    direction=(1, 0, 0, 0, 1, 0, 0, 0, 1),
)


def gland() -> np.ndarray:
    """Return two zones, labels 1 and 2, 27.7 mL together."""
    labels = np.zeros(GRID.shape_vox, np.uint8)
    labels[1:9, 3:37, 3:37] = 1
    labels[1:9, 20:37, 3:37] = 2
    return labels


def soft_map() -> np.ndarray:
    """Return a smooth map from 0 to 255."""
    z, y, x = np.indices(GRID.shape_vox)
    radius = np.sqrt(((z - 4.5) * 3) ** 2 + (y - 19.5) ** 2 + (x - 19.5) ** 2)
    return np.rint(255 / (1 + np.exp((radius - 12) / 2))).astype(np.uint8)


def structures(num: int) -> np.ndarray:
    """Return a label map of strips, 2 voxels wide in x."""
    return np.broadcast_to(np.arange(40) // 2 % (num + 1), GRID.shape_vox).astype(np.uint8)


def written(root: Path, mask: np.ndarray, *, image: np.ndarray | None = None) -> Case:
    pixels = np.random.default_rng(0).integers(0, 500, GRID.shape_vox).astype(np.int16) if image is None else image
    write_volume(root / "images/1_1.nii.gz", Volume(array=pixels, geometry=GRID))
    write_volume(root / "masks/1_1.nii.gz", Volume(array=mask, geometry=GRID))
    return Case(
        case_id="1_1",
        patient_id="1",
        study_id="1",
        image=root / "images/1_1.nii.gz",
        mask=root / "masks/1_1.nii.gz",
    )


def errors(case: Case, *, labels: Sequence[int] | None = None) -> list[Finding]:
    return [finding for finding in load_case(case, labels=labels)[1].findings if finding.is_error]


@pytest.mark.parametrize("factor", [0.9999999, 0.9996, 1.0004])
def test_mask_within_a_thousandth_of_whole_numbers_is_rounded(tmp_path: Path, factor: float) -> None:
    whole = load_case(written(tmp_path / "a", gland()), labels=[1, 2])
    near = load_case(written(tmp_path / "b", (gland() * factor).astype(np.float32)), labels=[1, 2])
    assert whole[0] is not None
    assert near[0] is not None
    assert near[0].mask.array.dtype.kind == "i"
    np.testing.assert_array_equal(near[0].mask.array, whole[0].mask.array)
    assert near[1] == whole[1]  # volumes of each label, and findings
    made = [preprocess_study(one.image, one.mask, settings=DEFAULT).mask for one in (whole[0], near[0])]
    assert made[0] is not None
    assert made[1] is not None
    np.testing.assert_array_equal(made[0].array, made[1].array)


@pytest.mark.parametrize(
    ("value", "accepted"), [(0.999, True), (1.001, True), (0.998, False), (-0.0005, True), (40000.3, False)]
)
def test_tolerance_of_a_label_is_a_thousandth(value: float, accepted: bool) -> None:
    array = gland().astype(np.float32)
    array[0, 0, 0] = value
    read = as_labels(Volume(array=array, geometry=GRID)).array
    assert (read.dtype.kind == "i") == accepted
    assert not accepted or read[0, 0, 0] == round(value)


def test_integer_masks_are_unchanged(tmp_path: Path) -> None:
    case = written(tmp_path, gland())
    assert case.mask is not None
    assert read_mask(case.mask).array.dtype == read_volume(case.mask).array.dtype == np.uint8


@pytest.mark.parametrize("labels", [None, [1]])
@pytest.mark.parametrize(
    ("mask", "check", "message"),
    [
        (
            soft_map() / np.float32(255),
            "label_not_integer",
            r"and 0\.\d+ is none, as \d+ of 16000 voxels.*nearest neighbour",
        ),
        (gland() * np.float32(0.5), "label_not_integer", r"and 0\.5 is none, as 4624 of 16000 voxels.*threshold it"),
        (soft_map(), "too_many_labels", r"\d+ labels \(1 to 25\d\) are no label map.*threshold it and export again"),
        (
            gland().astype(np.int16) - 1,
            "label_out_of_range",
            r"6752 voxels are outside, such as -1; export .* unsigned",
        ),
        (gland() * np.float32(1e12), "label_out_of_range", r"from 0 to 65535, and .* such as 1e\+12"),
        (gland().astype(np.int32) * 70000, "label_out_of_range", "such as 70000; export"),
    ],
)
def test_mask_that_is_no_label_map_is_refused_with_value_and_next_step(
    tmp_path: Path, mask: np.ndarray, check: str, message: str, labels: list[int] | None
) -> None:
    (finding,) = errors(written(tmp_path, mask), labels=labels)
    assert (finding.case_id, finding.check) == ("1_1", check)
    assert re.search(message, finding.message), finding.message


def test_one_label_of_255_and_ten_labels_are_accepted(tmp_path: Path) -> None:
    assert errors(written(tmp_path / "a", (gland() > 0) * np.uint8(255))) == []
    assert label_problem(structures(10), labels=None) is None


def test_255_beside_other_labels_is_a_warning_unless_the_labels_are_named(tmp_path: Path) -> None:
    mask = gland()
    mask[1:9, 36, 3:37] = 255
    case = written(tmp_path, mask)
    assert [one.check for one in load_case(case, labels=None)[1].findings] == ["label_255"]
    assert load_case(case, labels=[1, 2])[1].findings == []


def test_map_of_many_structures_needs_the_labels_of_the_gland() -> None:
    problem = label_problem(structures(19), labels=None)
    assert problem is not None
    assert problem[0] == "too_many_labels"
    assert "19 labels (1 to 19)" in problem[1]
    assert "data.whole_gland_labels=[...]" in problem[1]
    assert label_problem(structures(19), labels=[3]) is None
    assert label_problem(structures(19).astype(np.int16) * 1000, labels=[3000]) is None  # fits into 8 bits


def test_image_in_place_of_the_mask_is_refused(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 3, GRID.shape_vox).astype(np.int16)
    (finding,) = errors(written(tmp_path, image.astype(np.float32), image=image))
    assert finding.check == "mask_is_image"
    assert label_problem(np.random.default_rng(1).integers(0, 900, GRID.shape_vox), labels=[1]) is not None
