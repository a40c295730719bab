"""Quality checks of images and masks: both sides of every threshold."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from prostate_seg.imaging.geometry import Finding, Geometry, Spacing, Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.imaging.quality import (
    MAX_IMAGE_DISORDER,
    MAX_MASK_DISORDER,
    check_case,
    check_slice_planes,
    check_zones,
    image_disorder,
    mask_disorder,
    measure_reference,
    slice_plane,
    solid_fraction,
    whole_gland,
)
from prostate_seg.phantom.settings import PhantomSettings
from prostate_seg.phantom.studies import PhantomCase, make_phantom_case
from tests.imaging_helpers import real_study

GRID = Geometry(
    shape_vox=(20, 100, 100),
    spacing_mm=(3.0, 1.0, 1.0),
    origin_mm=(-50.0, -50.0, -30.0),
    direction=(1, 0, 0, 0, 1, 0, 0, 0, 1),
)
ORDERS: dict[str, Callable[[int], list[int]]] = {
    "even then odd": lambda num: [*range(0, num, 2), *range(1, num, 2)],
    "every third": lambda num: [*range(0, num, 3), *range(1, num, 3), *range(2, num, 3)],
    "by name": lambda num: sorted(range(num), key=str),
    "shuffled": lambda num: np.random.default_rng(0).permutation(num).tolist(),
}
"""Wrong slice orders of volumes that were converted from single files."""

REAL_STUDIES = ["10795_1000811", "10795_1000811b", "11373_1001396", "p158020_1", "p158021_1"]


def ellipsoid(*, radii_mm: Sequence[float] = (20, 20, 25), center_mm: Sequence[float] = (0, 0, 0)) -> np.ndarray:
    """Return a gland on GRID, uint8; radii and centre along z, y, x. The default has 42 mL."""
    index = np.indices(GRID.shape_vox).reshape(3, -1).T
    z_y_x_mm = GRID.to_world(index)[:, ::-1]
    inside = (((z_y_x_mm - center_mm) / radii_mm) ** 2).sum(axis=1) <= 1
    return inside.reshape(GRID.shape_vox).astype(np.uint8)


def synthetic_image() -> Volume:
    return Volume(array=np.random.default_rng(0).integers(0, 500, GRID.shape_vox, dtype=np.uint16), geometry=GRID)


def synthetic_mask(array: np.ndarray | None = None) -> Volume:
    return Volume(array=ellipsoid() if array is None else array, geometry=GRID)


def check_image(case_id: str, image: Volume) -> list[Finding]:
    return check_case(case_id, image, None, labels=None).findings


def check_mask(case_id: str, mask: Volume, *, labels: Sequence[int] | None) -> list[Finding]:
    return check_case(case_id, None, mask, labels=labels).findings


def check_pair(case_id: str, image: Volume, mask: Volume) -> list[Finding]:
    findings = check_case(case_id, image, mask, labels=None).findings
    return [finding for finding in findings if finding.check == "grids_differ"]


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def checks(findings: list[Finding]) -> dict[str, bool]:
    """Return whether each finding is an error, by check."""
    return {finding.check: finding.is_error for finding in findings}


def test_a_good_case_has_no_findings() -> None:
    assert check_case("a", synthetic_image(), synthetic_mask(), labels=None).findings == []


def test_the_warnings_of_reading_are_findings_of_their_volume() -> None:
    doubt = Finding(check="no_orientation", message="no orientation is stated")
    findings = check_case("1_1", replace(synthetic_image(), warnings=(doubt,)), synthetic_mask(), labels=None).findings
    assert checks(findings) == {"no_orientation": False}
    assert only(findings).message == "image: no orientation is stated"
    assert checks(
        check_case("1_1", synthetic_image(), replace(synthetic_mask(), warnings=(doubt,)), labels=None).findings
    )


class TestImage:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_nan_voxels_are_an_error_with_their_count(self, value: float) -> None:
        array = synthetic_image().array.astype(np.float32)
        array[3, 4, 5:8] = value
        finding = only(check_image("a", Volume(array=array, geometry=GRID)))
        assert (finding.check, finding.is_error, finding.case_id) == ("nan", True, "a")
        assert "3 of 200000" in finding.message

    def test_an_image_without_intensity_range_is_an_error(self) -> None:
        finding = only(check_image("a", replace(synthetic_image(), array=np.full(GRID.shape_vox, 7, np.int16))))
        assert (finding.check, finding.is_error) == ("constant_image", True)
        assert "every voxel is 7" in finding.message

    @pytest.mark.parametrize(("num_slices", "expected"), [(1, ["few_slices"]), (2, ["few_slices"]), (3, [])])
    def test_fewer_than_three_slices_are_an_error(self, num_slices: int, expected: list[str]) -> None:
        image = synthetic_image()
        short = Volume(array=image.array[:num_slices], geometry=replace(GRID, shape_vox=(num_slices, 100, 100)))
        assert list(checks(check_image("a", short))) == expected

    def test_a_one_slice_volume_is_read_and_then_refused(self, tmp_path: Path) -> None:
        one = Volume(array=synthetic_image().array[:1], geometry=replace(GRID, shape_vox=(1, 100, 100)))
        write_volume(tmp_path / "a.nii.gz", one)
        finding = only(check_image("a", read_volume(tmp_path / "a.nii.gz")))
        assert finding.check == "few_slices"
        assert "1x100x100" in finding.message


class TestSlicePlane:
    @pytest.mark.parametrize(
        ("spacing_mm", "plane"),
        [
            ((3.0, 0.5, 0.5), "axial"),
            ((0.5, 3.0, 0.5), "coronal"),
            ((0.5, 0.5, 3.0), "sagittal"),
            ((1.0, 0.6, 0.6), "axial"),
            ((0.6, 0.6, 1.0), "sagittal"),
            ((0.9, 0.9, 1.0), "axial"),  # nearly cubes: axial slices can be cut from it
            ((1.0, 1.0, 1.0), "axial"),
        ],
    )
    def test_slices_are_stacked_along_the_longest_edge(self, spacing_mm: Spacing, plane: str) -> None:
        assert slice_plane(spacing_mm) == plane
        image = replace(synthetic_image(), geometry=replace(GRID, spacing_mm=spacing_mm))
        findings = check_image("a", image)
        assert checks(findings) == ({} if plane == "axial" else {"not_axial": False})
        assert plane == "axial" or f"its slices are {plane} (spacing z, y, x" in findings[0].message

    @pytest.mark.parametrize("code", ["LPS", "PIR", "SAL"])
    def test_plane_does_not_depend_on_the_order_in_which_a_file_stores_its_axes(
        self, tmp_path: Path, code: str
    ) -> None:
        sagittal = replace(GRID, spacing_mm=(1.0, 1.0, 4.0))
        image = replace(synthetic_image(), geometry=sagittal, stored_orientation=code)
        write_volume(tmp_path / "a.nii.gz", image)
        assert checks(check_image("a", read_volume(tmp_path / "a.nii.gz"))) == {"not_axial": False}

    def test_order_of_sagittal_slices_is_checked_along_their_own_axis(self) -> None:
        x = np.cumsum(np.random.default_rng(0).normal(size=GRID.shape_vox), axis=2)  # symmetric
        sagittal = replace(GRID, spacing_mm=(1.0, 1.0, 3.0))
        assert checks(check_image("a", Volume(array=x, geometry=sagittal))) == {"not_axial": False}
        mixed = x[..., np.random.default_rng(0).permutation(x.shape[2])]
        found = checks(check_image("a", Volume(array=mixed, geometry=sagittal)))
        assert found == {"not_axial": False, "slices_out_of_order": False}

    @pytest.mark.parametrize(
        ("planes", "named", "message"),
        [
            ("aaaas", ["5"], "its slices are sagittal, the others' axial; use its axial series"),
            ("cccca", ["5"], "its slices are axial, the others' coronal"),
            ("aaasc", ["4", "5"], "its slices are sagittal, most others' axial"),
            ("as", [], ""),
            ("s", [], ""),
            ("", [], ""),
            ("sss", [], ""),
        ],
    )
    def test_case_with_another_slice_plane_than_most_is_reported(
        self, planes: str, named: list[str], message: str
    ) -> None:
        spacings: dict[str, Spacing] = {"a": (3, 1, 1), "c": (1, 3, 1), "s": (1, 1, 3)}
        findings = check_slice_planes({str(at + 1): spacings[one] for at, one in enumerate(planes)})
        assert [(one.case_id, one.check, one.is_error) for one in findings] == [
            (case_id, "slice_plane_differs", False) for case_id in named
        ]
        assert not findings or findings[0].message.startswith(message)


class TestPair:
    def test_mask_on_shifted_grid_is_rejected_and_both_grids_shown(self) -> None:
        shifted = Volume(array=ellipsoid(), geometry=replace(GRID, origin_mm=(-50.5, -50.0, -30.0)))
        finding = only(check_pair("a", synthetic_image(), shifted))
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
        assert list(checks(check_pair("a", synthetic_image(), mask))) == ["grids_differ"]

    @pytest.mark.parametrize(("degrees", "expected"), [(0.03, []), (0.5, ["grids_differ"])])
    def test_a_rotation_rounded_by_nifti_is_accepted_and_a_larger_one_refused(
        self, degrees: float, expected: list[str]
    ) -> None:
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turned = replace(GRID, direction=(cos, -sin, 0, sin, cos, 0, 0, 0, 1))
        assert list(checks(check_pair("a", synthetic_image(), Volume(array=ellipsoid(), geometry=turned)))) == expected

    @pytest.mark.parametrize("code", ["RAS", "LPI", "SAL", "PIR"])
    def test_a_mask_stored_in_another_orientation_on_the_same_grid_passes(self, tmp_path: Path, code: str) -> None:
        write_volume(tmp_path / "image.mha", synthetic_image())
        write_volume(tmp_path / "mask.nii.gz", replace(synthetic_mask(), stored_orientation=code))
        image, mask = read_volume(tmp_path / "image.mha"), read_volume(tmp_path / "mask.nii.gz")
        assert mask.stored_orientation == code
        assert check_case("a", image, mask, labels=None).findings == []
        np.testing.assert_array_equal(mask.array, ellipsoid())


class TestLabels:
    def test_an_empty_mask_is_an_error(self) -> None:
        finding = only(check_mask("a", synthetic_mask(np.zeros(GRID.shape_vox, np.uint8)), labels=None))
        assert (finding.check, finding.is_error) == ("empty_mask", True)

    def test_an_empty_mask_is_empty_whatever_labels_are_wanted(self) -> None:
        assert (
            only(check_mask("a", synthetic_mask(np.zeros(GRID.shape_vox, np.uint8)), labels=[1])).check == "empty_mask"
        )

    def test_probabilities_are_refused(self) -> None:
        finding = only(check_mask("a", synthetic_mask(ellipsoid() * np.float32(0.25)), labels=None))
        assert (finding.check, finding.is_error) == ("label_not_integer", True)
        assert "0.25" in finding.message

    def test_whole_numbers_in_float_are_accepted(self) -> None:
        assert check_mask("a", synthetic_mask(ellipsoid().astype(np.float32)), labels=[1]) == []

    def test_nan_in_a_mask_is_an_error(self) -> None:
        array = ellipsoid().astype(np.float32)
        array[0, 0, 0] = np.nan
        assert checks(check_mask("a", synthetic_mask(array), labels=None)) == {"nan": True}

    def test_a_wanted_label_that_is_absent_is_an_error_naming_those_present(self) -> None:
        finding = only(check_mask("a", synthetic_mask(ellipsoid() * np.uint8(4)), labels=(1, 2)))
        assert (finding.check, finding.is_error) == ("wanted_label_absent", True)
        assert "is 1, 2, and the mask has 0, 4" in finding.message

    def test_one_of_the_wanted_labels_is_enough(self) -> None:
        assert check_mask("a", synthetic_mask(), labels=[1, 2]) == []

    def test_whole_gland_merges_all_labels_above_0_or_the_wanted_ones(self) -> None:
        zones = np.array([[0, 1, 2], [3, 255, 0]], dtype=np.uint8)
        np.testing.assert_array_equal(whole_gland(zones, labels=None), zones > 0)
        np.testing.assert_array_equal(whole_gland(zones, labels=(1, 2)), [[False, True, True], [False, False, False]])
        np.testing.assert_array_equal(whole_gland(np.array([-1, 0, 1]), labels=None), [False, False, True])
        assert whole_gland(zones, labels=[1]).dtype == bool


class TestGland:
    def test_components_are_a_warning_with_their_sizes(self) -> None:
        array = ellipsoid()
        array[4, 2:7, 2:7] = 1
        finding = only(check_mask("a", synthetic_mask(array), labels=None))
        assert (finding.check, finding.is_error) == ("several_components", False)
        gland_ml = ellipsoid().sum() * 0.003
        assert f"2 components ({gland_ml:.3g}, 0.075 mL)" in finding.message

    def test_many_components_are_not_all_listed(self) -> None:
        array = ellipsoid()
        array[0, 1:20:2, 1] = 1
        findings = check_mask("a", synthetic_mask(array), labels=None)
        assert any("11 components" in finding.message and "and 6 more mL" in finding.message for finding in findings)

    def test_voxels_that_touch_at_a_corner_are_one_component(self) -> None:
        array = np.zeros(GRID.shape_vox, np.uint8)
        array[5:10, 20:60, 20:60] = array[10:15, 60:70, 60:70] = 1
        assert "several_components" not in checks(check_mask("a", synthetic_mask(array), labels=None))

    def test_a_hole_is_a_warning_with_its_size(self) -> None:
        array = ellipsoid()
        array[9:11, 48:53, 48:53] = 0
        finding = only(check_mask("a", synthetic_mask(array), labels=None))
        assert (finding.check, finding.is_error) == ("holes", False)
        assert "0.15 mL" in finding.message

    def test_a_hole_of_a_voxel_and_a_tunnel_to_the_outside_are_no_holes(self) -> None:
        array = ellipsoid()
        array[10, 50, 50] = 0
        assert check_mask("a", synthetic_mask(array), labels=None) == []
        array[:, 49:52, 49:52] = 0
        assert check_mask("a", synthetic_mask(array), labels=None) == []

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
        finding = only(check_mask("a", synthetic_mask(ellipsoid(center_mm=center_mm)), labels=None))
        assert (finding.check, finding.is_error) == ("mask_touches_border", False)
        assert f"({side})" in finding.message


class TestOutline:
    def test_a_box_is_compact_and_an_l_shape_is_not(self) -> None:
        gland = np.zeros((3, 20, 20), dtype=bool)
        gland[1, 5:15, 5:15] = True
        assert solid_fraction(gland) == pytest.approx(1.0)
        gland[1, 5:10, 10:15] = False
        assert solid_fraction(gland) == pytest.approx(75 / 87.5)

    def test_single_voxels_and_lines_are_compact(self) -> None:
        for gland in (np.ones((1, 1, 1), bool), np.ones((2, 1, 9), bool), np.ones((2, 9, 1), bool)):
            assert solid_fraction(gland) == pytest.approx(1.0)

    @pytest.mark.parametrize("radii_mm", [(28, 45, 48), (25, 12, 12), (10, 35, 20)])
    def test_round_glands_of_any_size_are_compact(self, radii_mm: tuple[float, ...]) -> None:
        assert solid_fraction(ellipsoid(radii_mm=radii_mm) > 0) > 0.93

    def test_a_protrusion_of_the_gland_is_a_warning_and_a_second_organ_an_error(self) -> None:
        array = ellipsoid()
        array[5:15, 5:50, 48:53] = 1
        assert checks(check_mask("a", synthetic_mask(array), labels=None)) == {"not_compact": False}
        array[5:15, 5:15, 10:50] = 1
        assert checks(check_mask("a", synthetic_mask(array), labels=None)) == {"not_compact": True}

    def test_stray_voxels_do_not_change_the_compactness(self) -> None:
        array = ellipsoid()
        array[3:17, 2, 2] = 1
        assert "not_compact" not in checks(check_mask("a", synthetic_mask(array), labels=None))


@cache
def phantom(seed: int, difficulty: float) -> PhantomCase:
    settings = PhantomSettings(
        num_patients=1,
        num_second_studies=0,
        field_of_view_mm=100.0,
        num_slices_range=(18, 24),
        gland_volume_range_ml=(25.0, 90.0),
        difficulty=difficulty,
        scanners=("standard",),
    )
    return make_phantom_case("ph001_1", settings=settings, seed=seed)


PHANTOMS = [(0, 0.0), (1, 0.3), (2, 0.6), (3, 1.0)]


class TestSliceOrder:
    def test_gain_of_reversing_a_run_is_measured_in_mean_steps(self) -> None:
        # Correlations of 4 slices are the cosines between 0, 60, 30 and 90 degrees: the middle two are swapped.
        first, second = np.array([[1, 1], [-1, -1]]), np.array([[1, -1], [1, -1]])
        swapped = np.stack([np.cos(a) * first + np.sin(a) * second + 7 for a in np.deg2rad([0, 60, 30, 90])])
        near, far = 1 - np.cos(np.deg2rad(30)), 1 - np.cos(np.deg2rad(60))
        assert image_disorder(swapped) == pytest.approx(2 * (far - near) / ((2 * far + near) / 3))
        assert image_disorder(swapped[[0, 2, 1, 3]]) == pytest.approx(0, abs=1e-9)
        assert image_disorder(swapped[[2, 0, 1, 3]]) > MAX_IMAGE_DISORDER  # a run at the end of the stack

    def test_disorder_of_a_mask_is_the_area_missing_between_its_neighbours(self) -> None:
        gland = np.zeros((5, 6, 6), dtype=bool)
        gland[[0, 2, 4], 1:5, 1:5] = gland[1, 2:4, 2:4] = True  # 16, 4, 16, none and 16 pixels
        assert mask_disorder(gland) == 0.75  # a slice without gland is a gap, not disorder
        assert mask_disorder(ellipsoid() > 0) == 0.0

    @pytest.mark.parametrize("case", PHANTOMS)
    def test_phantoms_are_in_order_also_when_reversed(self, case: tuple[int, float]) -> None:
        image, mask = phantom(*case).image.array, phantom(*case).mask.array > 0
        for step in (1, -1):
            assert image_disorder(image[::step]) == 0
            assert mask_disorder(mask[::step]) < 0.01

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("case", PHANTOMS)
    def test_slices_of_a_phantom_out_of_order_are_two_warnings(self, case: tuple[int, float], order: str) -> None:
        index = ORDERS[order](phantom(*case).image.geometry.shape_vox[0])
        image, mask = (
            replace(volume, array=volume.array[index]) for volume in (phantom(*case).image, phantom(*case).mask)
        )
        found = [
            one for one in check_case("a", image, mask, labels=None).findings if one.check == "slices_out_of_order"
        ]
        assert [finding.is_error for finding in found] == [False, False]
        assert "sort the slices by position" in found[0].message
        assert "mask" in found[1].message

    @pytest.mark.parametrize("case", PHANTOMS)
    def test_two_swapped_neighbours_are_detected_in_the_image(self, case: tuple[int, float]) -> None:
        array = phantom(*case).image.array.copy()
        middle = len(array) // 2
        array[[middle, middle + 1]] = array[[middle + 1, middle]]
        assert image_disorder(array) > MAX_IMAGE_DISORDER

    def test_blank_repeated_and_noisy_slices_are_in_order(self) -> None:
        array = phantom(1, 0.3).image.array.astype(float)
        array[[0, 1, -1]] = 0
        noise = np.random.default_rng(0).normal(scale=array.std(), size=array.shape)
        for stack in (
            array,
            array.repeat(3, axis=0),
            array + noise,
            np.zeros_like(array),
            array[5:6].repeat(9, axis=0),
        ):
            assert image_disorder(stack) < MAX_IMAGE_DISORDER / 5

    def test_slices_without_gland_between_gland_are_a_warning_naming_them(self) -> None:
        array = ellipsoid()
        array[[9, 12]] = 0
        findings = check_mask("a", synthetic_mask(array), labels=None)
        assert checks(findings) == {"several_components": False, "gap": False}
        assert "2 slices between slices with gland have none (9, 12, " in findings[1].message


class TestZones:
    def test_labels_have_volumes_also_those_that_are_not_gland(self) -> None:
        array = np.zeros(GRID.shape_vox, np.uint8)
        array[5:10, 20:60, 20:60], array[5:10, 20:60, 60:70], array[5, 0:10, 0:10] = 1, 2, 9
        quality = measure_reference(synthetic_mask(array), labels=[1, 2])
        assert quality.labels_ml == pytest.approx({1: 24.0, 2: 6.0, 9: 0.3})
        assert quality.gland_volume_ml == pytest.approx(30.0)
        assert (quality.num_slices, quality.components_ml) == (5, pytest.approx((30.0,)))

    @pytest.mark.parametrize(
        ("labels", "words"),
        [([2], "has 2, lacks 1"), ([1, 2, 3], "has 1, 2, 3, alone has 3"), ([4], "has 4, lacks 1, 2, alone has 4")],
    )
    def test_a_mask_unlike_most_others_is_a_warning_naming_the_labels(self, labels: list[int], words: str) -> None:
        finding = only(check_zones({**{name: [1, 2] for name in "bcdef"}, "a": labels}))
        assert (finding.case_id, finding.check, finding.is_error) == ("a", "zone_missing", False)
        assert words in finding.message

    @pytest.mark.parametrize(
        "labels_of",
        [
            {"a": [1, 2], "b": [2], "c": [1, 2]},
            {"a": [1], "b": [1], "c": [1], "d": [1, 2], "e": [1, 2]},
            {"a": [1], "b": [1], "c": [1], "d": [1], "e": [1]},
            {},
        ],
        ids=["few", "mixed", "equal", "none"],
    )
    def test_data_sets_without_a_majority_or_an_exception_have_no_findings(
        self, labels_of: dict[str, list[int]]
    ) -> None:
        assert check_zones(labels_of) == []


class TestRealData:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("case_id", REAL_STUDIES)
    def test_real_slices_are_in_order_and_out_of_order_when_mixed(
        self, shared_data: Path, case_id: str, order: str
    ) -> None:
        image, mask = real_study(shared_data, case_id)
        gland = mask.array[mask.array.any(axis=(1, 2))] > 0
        assert image_disorder(image.array) == 0
        assert mask_disorder(gland) < MAX_MASK_DISORDER / 1.8
        assert image_disorder(image.array[ORDERS[order](len(image.array))]) > 2 * MAX_IMAGE_DISORDER
        assert mask_disorder(gland[ORDERS[order](len(gland))]) > 1.5 * MAX_MASK_DISORDER

    def test_real_cases_have_no_findings(self, shared_data: Path) -> None:
        for case_id in REAL_STUDIES:
            image, mask = real_study(shared_data, case_id)
            assert check_case(case_id, image, mask, labels=None).findings == []
            assert solid_fraction(mask.array > 0) > 0.95

    def test_the_known_faulty_mask_is_refused(self, shared_data: Path) -> None:
        mask = read_volume(shared_data / "ugly" / "11050_1001070_faulty_whole_gland_mask.nii.gz")
        finding = only(check_mask("11050_1001070", mask, labels=None))
        assert (finding.check, finding.is_error) == ("not_compact", True)
        assert "fills 59%" in finding.message

    def test_a_mask_of_another_patient_is_refused(self, shared_data: Path) -> None:
        image = read_volume(shared_data / "t2w" / "images" / "10795_1000811.mha")
        mask = read_volume(shared_data / "t2w" / "masks" / "11373_1001396.nii.gz")
        assert image.geometry.shape_vox == mask.geometry.shape_vox
        assert list(checks(check_case("a", image, mask, labels=None).findings)) == ["grids_differ"]
