"""Preprocessing to the network's grid and back: window, padding, intensities and the exact inverse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from prostate_seg.common.errors import InputError
from prostate_seg.common.settings import parse_group
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume, to_sitk, write_volume
from prostate_seg.imaging.preprocessing import (
    PreprocessSettings,
    preprocess_study,
    resampled_geometry,
    restore_probability,
)
from tests.imaging_helpers import DEFAULT, dice, real_study, rotate, rotation

REAL_STUDIES = ["10795_1000811", "10795_1000811b", "11373_1001396", "p158020_1", "p158021_1"]


def block_mask(volume: Volume, *, y: slice = slice(20, 40), x: slice = slice(20, 40)) -> Volume:
    mask = np.zeros(volume.geometry.shape_vox, dtype=np.uint8)
    mask[5:15, y, x] = 1
    return replace(volume, array=mask)


def test_same_spacing_copies_voxels_without_interpolation(cube_volume: Volume) -> None:
    settings = replace(DEFAULT, image_size=40, to_8bit=False)
    result = preprocess_study(cube_volume, None, settings=settings)
    np.testing.assert_array_equal(result.image.array, cube_volume.array[:, 10:50, 10:50])
    np.testing.assert_allclose(result.image.geometry.origin_mm, cube_volume.geometry.to_world((0, 10, 10)))
    assert np.isnan(result.gland_kept_fraction)
    assert result.mask is None


def test_8_bit_maps_the_percentiles_to_0_and_255(cube_volume: Volume) -> None:
    result = preprocess_study(cube_volume, None, settings=replace(DEFAULT, image_size=32))
    kept = cube_volume.array[:, 14:46, 14:46]
    low, high = np.percentile(kept, (0.5, 99.5))
    expected = np.rint((kept.clip(low, high) - low) / (high - low) * 255)
    assert result.image.array.dtype == np.uint8
    np.testing.assert_array_equal(result.image.array, expected)


def test_crop_over_the_border_is_padded_on_that_side(cube_volume: Volume) -> None:
    mask = block_mask(cube_volume, y=slice(0, 10), x=slice(25, 35))
    settings = replace(DEFAULT, image_size=32, crop="mask", to_8bit=False)
    result = preprocess_study(cube_volume, mask, settings=settings)
    assert result.mask is not None
    # The mask's middle is row 4.5, so that the window starts at row -11: eleven padded rows, then the study.
    np.testing.assert_array_equal(result.image.array[:, 11:, :], cube_volume.array[:, :21, 14:46])
    assert (result.image.array[:, :11] == result.image.array[:, 11:].min()).all()
    assert not result.mask.array[:, :11].any()
    assert result.gland_kept_fraction == 1.0
    np.testing.assert_allclose(result.image.geometry.origin_mm, cube_volume.geometry.to_world((0, -11, 14)))


def test_window_larger_than_the_study_is_padded_all_around(cube_volume: Volume) -> None:
    result = preprocess_study(cube_volume, None, settings=replace(DEFAULT, image_size=100, to_8bit=False))
    np.testing.assert_array_equal(result.image.array[:, 20:80, 20:80], cube_volume.array)
    assert result.image.array.shape == (20, 100, 100)


def test_kept_fraction_counts_the_gland_voxels_in_the_window(cube_volume: Volume) -> None:
    mask = block_mask(cube_volume, y=slice(20, 40), x=slice(0, 40))
    result = preprocess_study(cube_volume, mask, settings=replace(DEFAULT, image_size=40))
    assert result.gland_kept_fraction == pytest.approx(30 / 40)


def test_crop_mask_without_a_mask_is_refused(cube_volume: Volume) -> None:
    with pytest.raises(InputError, match="there is none; use preprocess.crop=center"):
        preprocess_study(cube_volume, None, settings=replace(DEFAULT, crop="mask"))


def test_region_without_intensity_range_is_refused(cube_volume: Volume) -> None:
    flat = replace(cube_volume, array=np.ones_like(cube_volume.array))
    with pytest.raises(InputError, match="no intensity range"):
        preprocess_study(flat, None, settings=DEFAULT)


@pytest.mark.parametrize("spacing_mm", [(3.0, 0.5, 0.5), (2.0, 0.7, 0.7), (3.6, 0.31, 0.43)])
def test_resampled_grid_keeps_the_centre_of_the_study(
    cube_volume: Volume, spacing_mm: tuple[float, float, float]
) -> None:
    grid = resampled_geometry(cube_volume.geometry, spacing_mm=spacing_mm)
    middles = [g.to_world((np.array(g.shape_vox) - 1) / 2) for g in (grid, cube_volume.geometry)]
    np.testing.assert_allclose(*middles, atol=1e-9)
    assert grid.spacing_mm == spacing_mm


def test_window_equals_that_of_full_resampling_by_simpleitk_within_one_grey_value(shared_data: Path) -> None:
    for case_id in REAL_STUDIES:
        image, _ = real_study(shared_data, case_id)
        grid = resampled_geometry(image.geometry, spacing_mm=(3.0, 0.4, 0.4))
        whole = sitk.Resample(
            sitk.Cast(to_sitk(image), sitk.sitkFloat32),
            grid.shape_vox[::-1],
            sitk.Transform(),
            sitk.sitkBSpline,
            grid.origin_mm,
            grid.spacing_mm[::-1],
            grid.direction,
        )
        start = [(size - 160 + 1) // 2 for size in grid.shape_vox[1:]]
        kept = sitk.GetArrayFromImage(whole)[:, start[0] : start[0] + 160, start[1] : start[1] + 160]
        low, high = np.percentile(kept, (0.5, 99.5))
        expected = np.rint((kept.clip(low, high) - low) / (high - low) * 255)
        result = preprocess_study(image, None, settings=replace(DEFAULT, spacing_mm=(3.0, 0.4, 0.4)))
        np.testing.assert_allclose(result.image.array.astype(float), expected, atol=1)


def sampled(values: np.ndarray, *, pixel_mm: float) -> Volume:
    """Return a study of three equal slices of `pixel_mm`, from [Y, X]."""
    geometry = Geometry.from_xyz(
        (*values.shape[::-1], 3), (pixel_mm, pixel_mm, 3.0), origin_mm=(0, 0, 0), direction=np.eye(3)
    )
    return Volume(array=np.repeat(values[None].astype(np.float32), 3, axis=0), geometry=geometry)


@pytest.mark.parametrize("period_vox", [2.2, 2.7, 3.5, 12.0])
def test_coarser_voxels_are_means_over_their_width_so_that_fine_texture_does_not_alias(period_vox: float) -> None:
    # A box of width w multiplies a wave of period p by sinc(w / p); voxels three times as wide need w^2 = 3^2 - 1.
    wave = 100 + np.cos(2 * np.pi * np.arange(399) / period_vox)[None].repeat(399, axis=0)
    settings = replace(DEFAULT, spacing_mm=(3.0, 1.5, 1.5), image_size=96, to_8bit=False)
    coarse = preprocess_study(sampled(wave, pixel_mm=0.5), None, settings=settings).image.array[1, 48] - 100
    gain = np.sqrt(2 * np.mean(coarse**2))
    assert gain == pytest.approx(abs(np.sinc(np.sqrt(8) / period_vox)), abs=0.03)


def test_anti_aliasing_keeps_constants_and_ramps_and_filters_nothing_on_finer_grids() -> None:
    ramp = sampled(np.arange(200.0)[None].repeat(200, axis=0), pixel_mm=0.5)
    settings = replace(DEFAULT, spacing_mm=(3.0, 1.2, 1.2), image_size=64, to_8bit=False)
    result = preprocess_study(ramp, None, settings=settings).image
    expected = [ramp.geometry.to_index(result.geometry.to_world((1, 32, x)))[2] for x in range(64)]
    np.testing.assert_allclose(result.array[1, 32], expected, atol=1e-3)
    noise = sampled(np.random.default_rng(0).normal(size=(200, 200)), pixel_mm=0.5)
    finer = preprocess_study(noise, None, settings=replace(settings, spacing_mm=(3.0, 0.25, 0.25), image_size=128))
    shared = finer.image.array[1]  # twice as fine: the filter would lower the SD
    assert shared.std() > 0.7


@pytest.mark.parametrize("pixel_mm", [0.625, 0.8, 1.0, 1.5])
def test_mask_of_a_coarse_grid_loses_no_more_than_half_a_voxel_at_the_surface(pixel_mm: float) -> None:
    # The contour between two voxel centres is off by up to half a voxel, on average by a quarter along an axis: a disc of
    # radius R loses at most pixel / (4 R) of its Dice.
    radius_mm, fine_mm = 22.0, 0.3
    y, x = np.meshgrid(*[(np.arange(300) - 149.3) * fine_mm] * 2, indexing="ij")
    disc = (np.hypot(y, x) <= radius_mm).astype(np.uint8)
    image = sampled(np.random.default_rng(0).normal(size=disc.shape), pixel_mm=fine_mm)
    mask = replace(image, array=np.repeat(disc[None], 3, axis=0))
    settings = replace(DEFAULT, spacing_mm=(3.0, pixel_mm, pixel_mm), image_size=128)
    result = preprocess_study(image, mask, settings=settings)
    assert result.mask is not None
    restored = restore_probability(result.mask.array, window=result.image.geometry, original=image.geometry)
    assert 1 - dice(restored >= 0.5, mask.array > 0) <= pixel_mm / (4 * radius_mm)


@pytest.mark.parametrize("spacing_mm", [(3.0, 0.5, 0.5), None], ids=["default spacing", "native spacing"])
@pytest.mark.parametrize("case_id", REAL_STUDIES)
def test_round_trip_gives_the_exact_grid_and_nearly_the_same_mask(
    shared_data: Path, case_id: str, spacing_mm: tuple[float, float, float] | None
) -> None:
    image, mask = real_study(shared_data, case_id)
    result = preprocess_study(image, mask, settings=replace(DEFAULT, spacing_mm=spacing_mm))
    assert result.mask is not None
    restored = restore_probability(result.mask.array, window=result.image.geometry, original=image.geometry)
    assert restored.shape == image.array.shape
    assert dice(restored >= 0.5, mask.array > 0) >= 0.97


@pytest.mark.parametrize("case_id", REAL_STUDIES)
def test_default_window_keeps_the_gland_of_every_real_study(shared_data: Path, case_id: str) -> None:
    result = preprocess_study(*real_study(shared_data, case_id), settings=DEFAULT)
    assert result.gland_kept_fraction >= 0.995


def test_probability_outside_the_window_is_zero_and_inside_is_linear(cube_volume: Volume) -> None:
    result = preprocess_study(cube_volume, None, settings=replace(DEFAULT, image_size=40))
    ramp = np.broadcast_to(np.linspace(0, 1, 40, dtype=np.float32), (20, 40, 40))
    restored = restore_probability(ramp, window=result.image.geometry, original=cube_volume.geometry)
    np.testing.assert_allclose(restored[:, 10:50, 10:50], ramp, atol=1e-6)
    restored[:, 10:50, 10:50] = 0
    assert not restored.any()


def test_mask_labels_that_are_not_selected_are_background(cube_volume: Volume) -> None:
    mask = block_mask(cube_volume)
    mask.array[:, :, 30:][mask.array[:, :, 30:] > 0] = 2
    settings = replace(DEFAULT, image_size=40, whole_gland_labels=(2,))
    result = preprocess_study(cube_volume, mask, settings=settings)
    assert result.mask is not None
    np.testing.assert_array_equal(result.mask.array, (mask.array == 2)[:, 10:50, 10:50])


@pytest.mark.parametrize("orientation", ["RAI", "LPI", "RAS", "PSR", "SLA"])
def test_reoriented_file_gives_the_same_network_input(cube_volume: Volume, tmp_path: Path, orientation: str) -> None:
    write_volume(tmp_path / "a.mha", cube_volume)
    write_volume(tmp_path / "b.mha", replace(cube_volume, stored_orientation=orientation))
    settings = replace(DEFAULT, spacing_mm=(3.0, 0.6, 0.6), image_size=40)
    first, second = (
        preprocess_study(read_volume(tmp_path / name), None, settings=settings) for name in ("a.mha", "b.mha")
    )
    np.testing.assert_array_equal(first.image.array, second.image.array)
    np.testing.assert_allclose(first.image.geometry.origin_mm, second.image.geometry.origin_mm, atol=1e-9)


def test_rigidly_rotated_header_gives_the_same_voxels_on_the_rotated_grid(cube_volume: Volume) -> None:
    rotated = replace(cube_volume, geometry=rotate(cube_volume.geometry, degrees=17))
    settings = replace(DEFAULT, spacing_mm=(3.0, 0.6, 0.6), image_size=40)
    first, second = (preprocess_study(volume, None, settings=settings) for volume in (cube_volume, rotated))
    np.testing.assert_allclose(first.image.array, second.image.array, atol=1)
    np.testing.assert_allclose(
        rotation(17) @ first.image.geometry.to_world((3, 4, 5)), second.image.geometry.to_world((3, 4, 5)), atol=1e-9
    )


def test_settings_round_trip_and_every_change_changes_the_hash() -> None:
    assert parse_group(PreprocessSettings, DEFAULT.as_dict(), key="preprocess") == DEFAULT
    assert replace(DEFAULT, image_size=161).digest != DEFAULT.digest
