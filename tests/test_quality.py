"""Checks on images and masks: what each one says, and what it lets pass."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.imaging.quality import (
    Finding,
    check_case,
    check_image,
    check_mask,
    check_pair,
    solid_fraction,
    whole_gland,
)

GRID = Geometry(
    shape_vox=(20, 100, 100),
    spacing_mm=(3.0, 1.0, 1.0),
    origin_mm=(-50.0, -50.0, -30.0),
    direction=(1, 0, 0, 0, 1, 0, 0, 0, 1),
)
REAL_STUDIES = ["10795_1000811", "10795_1000811b", "11373_1001396", "p158020_1", "p158021_1"]


def ellipsoid(*, radii_mm: Sequence[float] = (20, 20, 25), center_mm: Sequence[float] = (0, 0, 0)) -> np.ndarray:
    """Return a gland on GRID, uint8; radii and centre along z, y, x. The default has 42 mL."""
    index = np.indices(GRID.shape_vox).reshape(3, -1).T
    z_y_x_mm = GRID.to_world(index)[:, ::-1]
    inside = (((z_y_x_mm - center_mm) / radii_mm) ** 2).sum(axis=1) <= 1
    return inside.reshape(GRID.shape_vox).astype(np.uint8)


def made_image() -> Volume:
    return Volume(array=np.random.default_rng(0).integers(0, 500, GRID.shape_vox, dtype=np.uint16), geometry=GRID)


def made_mask(array: np.ndarray | None = None) -> Volume:
    return Volume(array=ellipsoid() if array is None else array, geometry=GRID)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def checks(findings: list[Finding]) -> dict[str, bool]:
    """Return for each check that spoke whether it is an error."""
    return {finding.check: finding.is_error for finding in findings}


def test_a_good_case_has_no_findings() -> None:
    assert check_case("a", made_image(), made_mask(), labels=None) == []


class TestImage:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_voxels_that_are_no_numbers_are_an_error_with_their_count(self, value: float) -> None:
        array = made_image().array.astype(np.float32)
        array[3, 4, 5:8] = value
        finding = only(check_image("a", Volume(array=array, geometry=GRID)))
        assert (finding.check, finding.is_error, finding.case_id) == ("nan", True, "a")
        assert "3 of 200000" in finding.message

    def test_an_image_without_intensity_range_is_an_error(self) -> None:
        finding = only(check_image("a", replace(made_image(), array=np.full(GRID.shape_vox, 7, np.int16))))
        assert (finding.check, finding.is_error) == ("constant_image", True)
        assert "every voxel is 7" in finding.message

    @pytest.mark.parametrize(("num_slices", "expected"), [(1, ["few_slices"]), (2, ["few_slices"]), (3, [])])
    def test_fewer_than_three_slices_are_an_error(self, num_slices: int, expected: list[str]) -> None:
        image = made_image()
        short = Volume(array=image.array[:num_slices], geometry=replace(GRID, shape_vox=(num_slices, 100, 100)))
        assert list(checks(check_image("a", short))) == expected

    def test_a_one_slice_volume_is_read_and_then_refused(self, tmp_path: Path) -> None:
        one = Volume(array=made_image().array[:1], geometry=replace(GRID, shape_vox=(1, 100, 100)))
        write_volume(tmp_path / "a.nii.gz", one)
        finding = only(check_image("a", read_volume(tmp_path / "a.nii.gz")))
        assert finding.check == "few_slices"
        assert "1x100x100" in finding.message


class TestPair:
    def test_mask_on_shifted_grid_is_rejected_and_both_grids_shown(self) -> None:
        shifted = Volume(array=ellipsoid(), geometry=replace(GRID, origin_mm=(-50.5, -50.0, -30.0)))
        finding = only(check_pair("a", made_image(), shifted))
        assert (finding.check, finding.is_error) == ("grids_differ", True)
        assert f"image {GRID}" in finding.message
        assert f"mask  {shifted.geometry}" in finding.message
        assert "data.exclude" in finding.message

    @pytest.mark.parametrize(
        "other",
        [
            {"shape_vox": (19, 100, 100)},
            {"spacing_mm": (3.0, 1.0, 1.01)},
            {"spacing_mm": (3.3, 1.0, 1.0)},
            {"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)},
            {"origin_mm": (-50.0, -50.0, -27.0)},
            {"origin_mm": (-50.0, -50.15, -30.0)},
        ],
    )
    def test_every_part_of_the_grid_counts(self, other: dict[str, tuple[float, ...]]) -> None:
        grid = replace(GRID, **other)  # type: ignore[arg-type]
        mask = Volume(array=np.zeros(grid.shape_vox, np.uint8), geometry=grid)
        assert list(checks(check_pair("a", made_image(), mask))) == ["grids_differ"]

    @pytest.mark.parametrize(("degrees", "expected"), [(0.03, []), (0.5, ["grids_differ"])])
    def test_a_rotation_rounded_by_nifti_is_no_difference_and_a_larger_one_is(
        self, degrees: float, expected: list[str]
    ) -> None:
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turned = replace(GRID, direction=(cos, -sin, 0, sin, cos, 0, 0, 0, 1))
        assert list(checks(check_pair("a", made_image(), Volume(array=ellipsoid(), geometry=turned)))) == expected

    @pytest.mark.parametrize("code", ["RAS", "LPI", "SAL", "PIR"])
    def test_a_mask_stored_in_another_orientation_on_the_same_grid_passes(self, tmp_path: Path, code: str) -> None:
        write_volume(tmp_path / "image.mha", made_image())
        write_volume(tmp_path / "mask.nii.gz", replace(made_mask(), stored_orientation=code))
        image, mask = read_volume(tmp_path / "image.mha"), read_volume(tmp_path / "mask.nii.gz")
        assert mask.stored_orientation == code
        assert check_case("a", image, mask, labels=None) == []
        np.testing.assert_array_equal(mask.array, ellipsoid())


class TestLabels:
    def test_an_empty_mask_is_an_error(self) -> None:
        finding = only(check_mask("a", made_mask(np.zeros(GRID.shape_vox, np.uint8)), labels=None))
        assert (finding.check, finding.is_error) == ("empty_mask", True)

    def test_an_empty_mask_is_empty_whatever_labels_are_wanted(self) -> None:
        assert only(check_mask("a", made_mask(np.zeros(GRID.shape_vox, np.uint8)), labels=[1])).check == "empty_mask"

    def test_probabilities_are_no_labels(self) -> None:
        finding = only(check_mask("a", made_mask(ellipsoid() * np.float32(0.25)), labels=None))
        assert (finding.check, finding.is_error) == ("label_not_integer", True)
        assert "0.25" in finding.message

    def test_whole_numbers_in_float_are_labels(self) -> None:
        assert check_mask("a", made_mask(ellipsoid().astype(np.float32)), labels=[1]) == []

    def test_nan_in_a_mask_is_an_error(self) -> None:
        array = ellipsoid().astype(np.float32)
        array[0, 0, 0] = np.nan
        assert checks(check_mask("a", made_mask(array), labels=None)) == {"nan": True}

    def test_a_wanted_label_that_is_absent_is_an_error_naming_those_present(self) -> None:
        finding = only(check_mask("a", made_mask(ellipsoid() * np.uint8(4)), labels=(1, 2)))
        assert (finding.check, finding.is_error) == ("wanted_label_absent", True)
        assert "wants 1, 2, and the mask has 0, 4" in finding.message

    def test_one_of_the_wanted_labels_is_enough(self) -> None:
        assert check_mask("a", made_mask(), labels=[1, 2]) == []

    def test_whole_gland_merges_all_labels_above_0_or_the_wanted_ones(self) -> None:
        zones = np.array([[0, 1, 2], [3, 255, 0]], dtype=np.uint8)
        np.testing.assert_array_equal(whole_gland(zones, labels=None), zones > 0)
        np.testing.assert_array_equal(whole_gland(zones, labels=(1, 2)), [[False, True, True], [False, False, False]])
        np.testing.assert_array_equal(whole_gland(np.array([-1, 0, 1]), labels=None), [False, False, True])
        assert whole_gland(zones, labels=[1]).dtype == bool


class TestGland:
    def test_components_are_a_warning_with_their_sizes(self) -> None:
        array = ellipsoid()
        array[1, 2:7, 2:7] = 1
        finding = only(check_mask("a", made_mask(array), labels=None))
        assert (finding.check, finding.is_error) == ("several_components", False)
        gland_ml = ellipsoid().sum() * 0.003
        assert f"2 components ({gland_ml:.3g}, 0.075 mL)" in finding.message

    def test_many_components_are_not_all_listed(self) -> None:
        array = ellipsoid()
        array[0, 1:20:2, 1] = 1
        findings = check_mask("a", made_mask(array), labels=None)
        assert any("11 components" in finding.message and "and 6 more mL" in finding.message for finding in findings)

    def test_voxels_that_touch_at_a_corner_are_one_component(self) -> None:
        array = np.zeros(GRID.shape_vox, np.uint8)
        array[5:10, 20:60, 20:60] = array[10:15, 60:70, 60:70] = 1
        assert "several_components" not in checks(check_mask("a", made_mask(array), labels=None))

    def test_a_hole_is_a_warning_with_its_size(self) -> None:
        array = ellipsoid()
        array[9:11, 48:53, 48:53] = 0
        finding = only(check_mask("a", made_mask(array), labels=None))
        assert (finding.check, finding.is_error) == ("holes", False)
        assert "0.15 mL" in finding.message

    def test_a_hole_of_a_voxel_and_a_tunnel_to_the_outside_are_no_holes(self) -> None:
        array = ellipsoid()
        array[10, 50, 50] = 0
        assert check_mask("a", made_mask(array), labels=None) == []
        array[:, 49:52, 49:52] = 0
        assert check_mask("a", made_mask(array), labels=None) == []

    @pytest.mark.parametrize(
        ("scale", "expected"), [(0.6, True), (0.75, False), (1.0, False), (1.8, False), (2.0, True)]
    )
    def test_a_volume_outside_15_to_263_ml_is_a_warning(self, scale: float, expected: bool) -> None:
        grid = replace(GRID, spacing_mm=(3.0 * scale, scale, scale))
        findings = checks(check_mask("a", Volume(array=ellipsoid(), geometry=grid), labels=None))
        assert findings == ({"implausible_volume": False} if expected else {})

    @pytest.mark.parametrize(
        ("center_mm", "side"),
        [
            ((-20, 0, 0), "inferior"),
            ((20, 0, 0), "superior"),
            ((0, -40, 0), "anterior"),
            ((0, 40, 0), "posterior"),
            ((0, 0, -40), "right"),
            ((0, 0, 40), "left"),
        ],
    )
    def test_a_mask_at_the_border_is_a_warning_naming_the_side(self, center_mm: tuple[float, ...], side: str) -> None:
        finding = only(check_mask("a", made_mask(ellipsoid(center_mm=center_mm)), labels=None))
        assert (finding.check, finding.is_error) == ("mask_touches_border", False)
        assert f"({side})" in finding.message


class TestOutline:
    def test_a_box_fills_its_outline_and_an_l_shape_does_not(self) -> None:
        gland = np.zeros((3, 20, 20), dtype=bool)
        gland[1, 5:15, 5:15] = True
        assert solid_fraction(gland) == pytest.approx(1.0)
        gland[1, 5:10, 10:15] = False
        assert solid_fraction(gland) == pytest.approx(75 / 87.5)

    def test_single_voxels_and_lines_fill_their_outline(self) -> None:
        for gland in (np.ones((1, 1, 1), bool), np.ones((2, 1, 9), bool), np.ones((2, 9, 1), bool)):
            assert solid_fraction(gland) == pytest.approx(1.0)

    @pytest.mark.parametrize("radii_mm", [(28, 45, 48), (25, 12, 12), (10, 35, 20)])
    def test_round_glands_of_any_size_fill_their_outline(self, radii_mm: tuple[float, ...]) -> None:
        assert solid_fraction(ellipsoid(radii_mm=radii_mm) > 0) > 0.93

    def test_an_arm_out_of_the_gland_is_a_warning_and_a_second_organ_an_error(self) -> None:
        array = ellipsoid()
        array[5:15, 5:50, 48:53] = 1
        assert checks(check_mask("a", made_mask(array), labels=None)) == {"not_compact": False}
        array[5:15, 5:15, 10:50] = 1
        assert checks(check_mask("a", made_mask(array), labels=None)) == {"not_compact": True}

    def test_stray_voxels_do_not_count_for_the_outline(self) -> None:
        array = ellipsoid()
        array[3:17, 2, 2] = 1
        assert "not_compact" not in checks(check_mask("a", made_mask(array), labels=None))


class TestRealData:
    def test_real_cases_have_no_findings(self, shared_data: Path) -> None:
        for case_id in REAL_STUDIES:
            (image,) = (shared_data / "t2w" / "images").glob(f"{case_id}.*")
            mask = read_volume(shared_data / "t2w" / "masks" / f"{case_id}.nii.gz")
            assert check_case(case_id, read_volume(image), mask, labels=None) == []
            assert solid_fraction(mask.array > 0) > 0.95

    def test_the_mask_that_its_source_calls_faulty_is_refused(self, shared_data: Path) -> None:
        mask = read_volume(shared_data / "ugly" / "11050_1001070_faulty_whole_gland_mask.nii.gz")
        finding = only(check_mask("11050_1001070", mask, labels=None))
        assert (finding.check, finding.is_error) == ("not_compact", True)
        assert "fills 59%" in finding.message

    def test_a_mask_of_another_patient_is_refused(self, shared_data: Path) -> None:
        image = read_volume(shared_data / "t2w" / "images" / "10795_1000811.mha")
        mask = read_volume(shared_data / "t2w" / "masks" / "11373_1001396.nii.gz")
        assert image.geometry.shape_vox == mask.geometry.shape_vox
        assert list(checks(check_case("a", image, mask, labels=None))) == ["grids_differ"]
