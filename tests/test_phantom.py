"""The phantom: deterministic bytes, a known volume, a plausible pelvis, and refused settings."""

import csv
import hashlib
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from prostate_seg.imaging.geometry import Volume
from prostate_seg.phantom import patient as phantom_patient
from prostate_seg.phantom import settings as phantom_settings
from prostate_seg.phantom import study as phantom_study
from prostate_seg.phantom.settings import PhantomSettings
from prostate_seg.phantom.studies import PhantomCase, make_phantom_case, phantom_case_ids, scanner_of, write_phantom
from prostate_seg.phantom.study import CENTRAL_GLAND, PERIPHERAL_ZONE, SCANNERS

SMALL = PhantomSettings(
    num_patients=4,
    num_second_studies=2,
    field_of_view_mm=100.0,
    num_slices_range=(14, 18),
    gland_volume_range_ml=(20.0, 60.0),
    difficulty=0.3,
    scanners=("standard",),
)
CASE_IDS = ["ph001_1", "ph001_2", "ph002_1", "ph002_2", "ph003_1", "ph004_1"]


@cache
def case_of(case_id: str, *, difficulty: float = 0.3, seed: int = 1) -> PhantomCase:
    return make_phantom_case(case_id, settings=replace(SMALL, difficulty=difficulty), seed=seed)


def md5_of_volume(volume: Volume) -> str:
    return hashlib.md5(volume.array.tobytes() + str(volume.geometry).encode()).hexdigest()


def gland_of(case: PhantomCase) -> np.ndarray:
    return case.mask.array > 0


def test_first_patients_have_a_second_study() -> None:
    assert phantom_case_ids(SMALL) == CASE_IDS


def test_more_than_999_patients_still_sort() -> None:
    case_ids = phantom_case_ids(replace(SMALL, num_patients=1000))
    assert case_ids == sorted(case_ids)
    assert case_ids[-1] == "ph1000_1"


def test_same_arguments_give_the_same_bytes_in_any_order() -> None:
    case_of("ph004_1"), case_of("ph001_1")
    again = make_phantom_case("ph004_1", settings=SMALL, seed=1)
    assert md5_of_volume(again.image) == md5_of_volume(case_of("ph004_1").image)
    assert md5_of_volume(again.mask) == md5_of_volume(case_of("ph004_1").mask)


def test_a_case_does_not_depend_on_how_many_patients_there_are() -> None:
    among_more = make_phantom_case("ph004_1", settings=replace(SMALL, num_patients=9), seed=1)
    assert md5_of_volume(among_more.image) == md5_of_volume(case_of("ph004_1").image)


def test_another_seed_gives_another_patient() -> None:
    other = case_of("ph004_1", seed=2)
    assert other.true_volume_ml != case_of("ph004_1").true_volume_ml
    assert md5_of_volume(other.image) != md5_of_volume(case_of("ph004_1").image)


def test_unknown_case_is_refused() -> None:
    with pytest.raises(ValueError, match="case_id must be from ph001_1 to ph004_1, is ph004_2"):
        make_phantom_case("ph004_2", settings=SMALL, seed=1)


@pytest.mark.parametrize("case_id", CASE_IDS)
def test_mask_has_the_volume_of_the_formula(case_id: str) -> None:
    case = case_of(case_id)
    low, high = SMALL.gland_volume_range_ml
    assert low <= case.true_volume_ml <= high
    counted_ml = np.count_nonzero(gland_of(case)) * case.mask.geometry.voxel_volume_ml
    assert counted_ml == pytest.approx(case.true_volume_ml, rel=0.03)


def test_shears_and_taper_keep_the_volume_of_the_ellipsoid() -> None:
    gland = phantom_patient.draw_gland(np.random.default_rng(5), volume_ml=40.0)
    assert gland.volume_ml == pytest.approx(40.0)
    step_mm = 0.5
    z, y, x = np.meshgrid(*[np.arange(-50, 50, step_mm)] * 3, indexing="ij", sparse=True)
    unit = phantom_patient.unit_points(gland, phantom_patient.Points(x, y, z))
    counted_ml = np.count_nonzero(unit.x**2 + unit.y**2 + unit.z**2 <= 1) * step_mm**3 / 1000
    assert counted_ml == pytest.approx(40.0, rel=0.002)


def test_no_gland_reaches_further_than_the_field_of_view_assumes() -> None:
    glands = [phantom_patient.draw_gland(np.random.default_rng(seed), volume_ml=90.0) for seed in range(100)]
    reach = [np.linalg.norm(phantom_patient.surface_mm(gland), axis=1).max() / gland.half_width_mm for gland in glands]
    assert max(reach) <= phantom_settings.REACH


def test_second_study_shows_the_same_gland_on_another_grid() -> None:
    first, second = case_of("ph001_1"), case_of("ph001_2")
    assert first.true_volume_ml == second.true_volume_ml
    assert first.image.geometry.spacing_mm != second.image.geometry.spacing_mm
    assert first.image.array.shape != second.image.array.shape or np.any(first.image.array != second.image.array)


@pytest.mark.parametrize("case_id", CASE_IDS)
def test_image_and_mask_share_a_grid_with_the_configured_properties(case_id: str) -> None:
    case = case_of(case_id)
    slice_mm, row_mm, column_mm = case.image.geometry.spacing_mm
    assert 3.0 <= slice_mm <= 3.6
    assert 0.3 <= row_mm <= 0.6
    assert row_mm == column_mm
    assert case.image.geometry == case.mask.geometry
    assert case.image.array.shape == case.mask.array.shape == case.image.geometry.shape_vox
    assert case.image.geometry.shape_vox[1] * row_mm == pytest.approx(SMALL.field_of_view_mm, abs=row_mm)
    assert case.image.geometry.shape_vox[0] >= SMALL.num_slices_range[0]
    assert str(case.image.array.dtype) == "int16"
    assert str(case.mask.array.dtype) == "uint8"


def geometries_of(num_studies: int) -> list[tuple[float, str]]:
    """Return the tilt in degrees and the stored orientation of many studies, without rendering their images."""
    gland = phantom_patient.draw_gland(np.random.default_rng(0), volume_ml=40.0)
    studies = [
        phantom_study.draw_study(np.random.default_rng(s), gland, settings=SMALL, scanner=SCANNERS["standard"])
        for s in range(num_studies)
    ]
    return [(math.degrees(math.acos(s.geometry.direction[8])), s.stored_orientation) for s in studies]


def test_some_studies_are_axial_and_some_oblique_up_to_20_degrees() -> None:
    tilts = [tilt for tilt, _ in geometries_of(60)]
    assert min(tilts) == 0
    assert 15 < max(tilts) < 21
    assert sum(tilt > 3 for tilt in tilts) > 30


def test_most_studies_are_stored_as_lps_and_some_otherwise() -> None:
    codes = [code for _, code in geometries_of(60)]
    assert set(codes) == {"LPS", "RAS", "LAS"}
    assert codes.count("LPS") > 20


def test_directions_are_a_rotation() -> None:
    matrix = np.array(case_of("ph002_2").image.geometry.direction).reshape(3, 3)
    assert matrix @ matrix.T == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)


@pytest.mark.parametrize("case_id", CASE_IDS)
def test_whole_gland_lies_inside_with_a_margin(case_id: str) -> None:
    gland = gland_of(case_of(case_id))
    assert not gland[:2].any()
    assert not gland[-2:].any()
    assert not gland[:, :5].any()
    assert not gland[:, -5:].any()
    assert not gland[:, :, :5].any()
    assert not gland[:, :, -5:].any()


def test_a_long_gland_gets_more_slices() -> None:
    case = make_phantom_case("ph001_1", settings=replace(SMALL, num_slices_range=(8, 9)), seed=1)
    gland = gland_of(case)
    assert len(gland) > 9
    assert not gland[:2].any()
    assert not gland[-2:].any()


@pytest.mark.parametrize("case_id", CASE_IDS)
def test_gland_is_one_component_with_the_peripheral_zone_posterior(case_id: str) -> None:
    mask = case_of(case_id).mask.array
    assert set(np.unique(mask)) == {0, CENTRAL_GLAND, PERIPHERAL_ZONE}
    assert ndimage.label(mask > 0)[1] == 1
    mean_y = {zone: np.nonzero(mask == zone)[1].mean() for zone in (CENTRAL_GLAND, PERIPHERAL_ZONE)}
    assert mean_y[PERIPHERAL_ZONE] > mean_y[CENTRAL_GLAND]


@pytest.mark.parametrize("case_id", CASE_IDS)
def test_peripheral_zone_is_brighter_than_central_gland_and_urine_is_brightest(case_id: str) -> None:
    image, mask = case_of(case_id).image.array, case_of(case_id).mask.array
    central, peripheral = np.median(image[mask == CENTRAL_GLAND]), np.median(image[mask == PERIPHERAL_ZONE])
    assert image.min() >= 0
    assert 1.3 * central < peripheral < np.percentile(image[-1], 99)


def apex_contrast_to_noise(case: PhantomCase) -> float:
    """Return |gland - surroundings| over the standard deviation of the surroundings, in the lowest two gland slices."""
    gland = gland_of(case)
    first = int(np.argmax(gland.any(axis=(1, 2))))
    low, image = gland[first : first + 2], case.image.array[first : first + 2].astype(float)
    reach = round(4.0 / case.mask.geometry.spacing_mm[1])
    wide = ndimage.binary_dilation(low, structure=np.ones((1, 3, 3), dtype=bool), iterations=reach)
    around = image[wide & ~low]
    return float(abs(image[low].mean() - around.mean()) / around.std())


def test_higher_difficulty_hides_the_apex() -> None:
    easy, hard = (
        [
            apex_contrast_to_noise(case_of(case_id, difficulty=difficulty))
            for case_id in ("ph001_1", "ph003_1", "ph004_1")
        ]
        for difficulty in (0.0, 1.0)
    )
    assert np.mean(hard) < 0.6 * np.mean(easy)


def test_difficulty_changes_neither_shape_nor_grid() -> None:
    easy, hard = case_of("ph003_1", difficulty=0.0), case_of("ph003_1", difficulty=1.0)
    assert md5_of_volume(easy.mask) == md5_of_volume(hard.mask)


MULTI_SCANNER = replace(SMALL, num_patients=3, scanners=("fine", "coarse", "coil"))


def test_scanners_are_assigned_cyclically_and_determine_the_grids() -> None:
    assert [scanner_of(case_id, settings=MULTI_SCANNER) for case_id in phantom_case_ids(MULTI_SCANNER)] == [
        "fine",
        "fine",
        "coarse",
        "coarse",
        "coil",
    ]
    for case_id in ("ph001_1", "ph002_1", "ph003_1"):
        scanner = SCANNERS[scanner_of(case_id, settings=MULTI_SCANNER)]
        spacing_mm = make_phantom_case(case_id, settings=MULTI_SCANNER, seed=1).image.geometry.spacing_mm
        assert scanner.pixel_spacing_range_mm[0] <= spacing_mm[1] <= scanner.pixel_spacing_range_mm[1]
        assert scanner.slice_spacing_range_mm[0] <= spacing_mm[0] <= scanner.slice_spacing_range_mm[1]


def test_scanner_changes_the_image_but_not_the_patient() -> None:
    noisy = make_phantom_case("ph003_1", settings=replace(SMALL, scanners=("noisy",)), seed=1)
    standard = case_of("ph003_1")
    assert noisy.true_volume_ml == standard.true_volume_ml
    corner = np.s_[:, :12, :12]

    def noise(case: PhantomCase) -> float:
        return float(
            np.median(np.abs(np.diff(case.image.array[corner].astype(float), axis=2))) / case.image.array.mean()
        )

    assert noise(noisy) > 1.5 * noise(standard)


def test_cases_of_several_scanners_have_their_scanner_as_an_attribute(tmp_path: Path) -> None:
    write_phantom(tmp_path, settings=replace(MULTI_SCANNER, num_second_studies=0), seed=1)
    rows = list(csv.DictReader((tmp_path / "cases.csv").read_text().splitlines()))
    assert [row["scanner"] for row in rows] == ["fine", "coarse", "coil"]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("scanners", (), r"scanners: must name at least one scanner, is \[\]"),
        ("num_patients", 0, "num_patients: must be from 1 to 9999, is 0"),
        ("num_second_studies", 5, r"num_second_studies: must be from 0 to data.phantom.num_patients \(4\), is 5"),
        ("num_second_studies", -1, "num_second_studies: must be at least 0"),
        ("difficulty", 1.5, "difficulty: must be from 0 to 1, is 1.5"),
        ("difficulty", math.nan, "difficulty: must be from 0 to 1, is nan"),
        ("num_slices_range", (20, 10), r"num_slices_range: must be two rising numbers from 8 to 64, is \[20, 10\]"),
        ("gland_volume_range_ml", (5.0, 60.0), r"gland_volume_range_ml: .* from 15 to 263, is \[5.0, 60.0\]"),
        ("gland_volume_range_ml", (20.0, math.inf), "gland_volume_range_ml: must be two rising numbers"),
        ("gland_volume_range_ml", (20.0,), "gland_volume_range_ml: must be two rising numbers"),
        ("field_of_view_mm", 86.0, "field_of_view_mm: must be from 87 to 400 for glands of up to 60 mL, is 86.0"),
        ("field_of_view_mm", 4000.0, "field_of_view_mm: must be from 80 to 400"),
    ],
)
def test_impossible_settings_are_refused(name: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        replace(SMALL, **{name: value})  # type: ignore[arg-type]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


TWO_STUDIES = replace(SMALL, num_patients=1, num_second_studies=1)


def test_writing_twice_gives_the_same_bytes_and_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    written = write_phantom(tmp_path, settings=TWO_STUDIES, seed=1, num_workers=2)
    first = contents_of(tmp_path)
    write_phantom(tmp_path, settings=TWO_STUDIES, seed=1, num_workers=1)
    assert contents_of(tmp_path) == first
    assert written == [tmp_path / "images" / "ph001_1.nii.gz", tmp_path / "images" / "ph001_2.nii.gz"]
    files = ["images/ph001_1.nii.gz", "images/ph001_2.nii.gz", "masks/ph001_1.nii.gz", "masks/ph001_2.nii.gz"]
    assert list(first) == ["cases.csv", *files, "notes.txt", "phantom.csv"]


def test_table_states_the_volume_by_formula(tmp_path: Path) -> None:
    write_phantom(tmp_path, settings=TWO_STUDIES, seed=1)
    rows = list(csv.DictReader((tmp_path / "phantom.csv").read_text().splitlines()))
    case = case_of("ph001_2")
    assert [row["case_id"] for row in rows] == ["ph001_1", "ph001_2"]
    assert rows[1]["patient_id"] == "ph001"
    assert float(rows[1]["true_volume_ml"]) == pytest.approx(case.true_volume_ml, abs=1e-4)
    assert float(rows[1]["spacing_x_mm"]) == case.image.geometry.spacing_mm[2]
    assert rows[1]["stored_orientation"] == case.image.stored_orientation


def test_failed_write_leaves_the_previous_phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("images/old.nii.gz", "masks/old.nii.gz", "phantom.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    before = contents_of(tmp_path)

    def write_first_study_only(path: Path, volume: Volume) -> None:
        if path.name.startswith("ph001_2"):
            raise OSError("disk full")
        path.write_bytes(b"new")

    monkeypatch.setattr("prostate_seg.phantom.studies.write_volume", write_first_study_only)
    with pytest.raises(OSError, match="disk full"):
        write_phantom(tmp_path, settings=TWO_STUDIES, seed=1)
    assert contents_of(tmp_path) == before
