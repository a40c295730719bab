"""Per-case metrics: hand-computed values, agreement with MONAI, missed glands, thirds, refusals."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from monai.metrics import (
    AbsoluteVolumeDifferenceMetric,
    CumulativeIterationMetric,
    DiceMetric,
    HausdorffDistanceMetric,
    MeanIoU,
    SurfaceDiceMetric,
    SurfaceDistanceMetric,
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)
from scipy import ndimage

from prostate_seg.imaging.geometry import Geometry, Spacing
from prostate_seg.segmentation.metrics import (
    assd_mm,
    case_metrics,
    dice_by_thirds,
    hd95_mm,
    normalised_surface_dice,
    pooled_iou,
    surface,
    surface_distances,
    third_of_slice,
)
from prostate_seg.segmentation.overlap import dice, slice_counts

SPACING_MM: Spacing = (3.0, 0.5, 0.5)


def box_mask(shape: tuple[int, int, int], *ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*ends) for ends in ranges)] = True
    return mask


def ball(radius_mm: float, *, spacing_mm: Spacing, shape: tuple[int, int, int]) -> np.ndarray:
    centred = [(np.arange(size) - size // 2) * length for size, length in zip(shape, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*centred, indexing="ij")
    return z**2 + y**2 + x**2 <= radius_mm**2


def blob(seed: int, *, threshold: float = 0.3) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((9, 40, 44))
    smooth = ndimage.gaussian_filter(noise, (1.0, 3.0, 3.0))
    return smooth > threshold * smooth.std()


def monai_nsd(reference: np.ndarray, predicted: np.ndarray, *, spacing_mm: Spacing, tolerance_mm: float = 2.0) -> float:
    value = compute_surface_dice(
        as_batch(predicted),
        as_batch(reference),
        class_thresholds=[tolerance_mm],
        include_background=True,
        spacing=list(spacing_mm),
        use_subvoxels=True,
    )
    return float(value.item())


def as_batch(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(mask)[None, None].float()


def slices_with_gland(*indices: int, num_slices: int = 12) -> np.ndarray:
    mask = np.zeros((num_slices, 8, 8), dtype=bool)
    mask[list(indices), 2:6, 2:6] = True
    return mask


# --- shapes by hand: every metric ----------------------------------------------------------------------------------


BLOCK = box_mask((6, 16, 16), (1, 5), (2, 14), (2, 14))
"""Four slices of 12 x 12 voxels; at 3 x 1 x 1 mm a cube of 12 mm, 1.728 mL, with 4 * 144 - 2 * 100 surface voxels."""


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_cube_shifted_by_one_slice_of_3_mm_has_every_metric_by_hand() -> None:
    # In either direction 144 voxels of one end face are 3 mm off. Of the other end face, 10 x 10 voxels lie inside the
    # other cube, next to its side wall or 3 mm under its end: 36 are 1 mm, 28 are 2 mm and 36 are 3 mm off. Base: 144 of
    # the reference against 288, as the slice above its extent counts there.
    result = case_metrics(BLOCK, np.roll(BLOCK, 1, axis=0), spacing_mm=(3.0, 1.0, 1.0))
    assert asdict(result) == pytest.approx(
        {
            "dice": 3 / 4,
            "iou": 3 / 5,
            "hd95_mm": 3.0,
            "assd_mm": (180 * 3 + 28 * 2 + 36 * 1) / 376,
            "nsd_2mm": monai_nsd(BLOCK, np.roll(BLOCK, 1, axis=0), spacing_mm=(3.0, 1.0, 1.0)),
            "volume_reference_ml": 1.728,
            "volume_predicted_ml": 1.728,
            "volume_difference_ml": 0.0,
            "volume_difference_percent": 0.0,
            "dice_apex": 0.0,
            "dice_mid": 1.0,
            "dice_base": 2 / 3,
            "missed_gland": False,
        }
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_cube_without_its_top_slice_has_every_metric_by_hand() -> None:
    # From the reference 144 voxels are 3 mm off. From the prediction the 10 x 10 voxels of its new end face are off the
    # side wall by 1, 2 and 3 mm or more, as above, and 3 mm under the reference's end. 376 and 332 surface voxels.
    predicted = BLOCK.copy()
    predicted[4] = False
    result = case_metrics(BLOCK, predicted, spacing_mm=(3.0, 1.0, 1.0))
    assert asdict(result) == pytest.approx(
        {
            "dice": 6 / 7,
            "iou": 3 / 4,
            "hd95_mm": 3.0,
            "assd_mm": (180 * 3 + 28 * 2 + 36 * 1) / (376 + 332),
            "nsd_2mm": monai_nsd(BLOCK, predicted, spacing_mm=(3.0, 1.0, 1.0)),
            "volume_reference_ml": 1.728,
            "volume_predicted_ml": 1.296,
            "volume_difference_ml": -0.432,
            "volume_difference_percent": -25.0,
            "dice_apex": 1.0,
            "dice_mid": 1.0,
            "dice_base": 0.0,
            "missed_gland": False,
        }
    )


@pytest.mark.parametrize("slices", [slice(1, 5), slice(1, None)], ids=["both ends", "lower end"])
def test_the_border_of_the_image_changes_no_metric(slices: slice) -> None:
    reference, predicted = BLOCK[slices, 2:14, 2:], np.roll(BLOCK, -1, axis=2)[slices, 2:14, 1:-1]
    padded = [np.pad(mask, 3) for mask in (reference, predicted)]
    at_border = case_metrics(reference, predicted, spacing_mm=(3.0, 1.0, 1.0))
    assert case_metrics(*padded, spacing_mm=(3.0, 1.0, 1.0)) == at_border


def slab_ml(radius_mm: float, half_mm: float) -> float:
    """Return the volume of a ball within a distance of its equator: pi (r^2 - z^2) integrated over z."""
    return 2 * math.pi * (radius_mm**2 * half_mm - half_mm**3 / 3) / 1000


@pytest.mark.parametrize(
    ("spacing_mm", "shape"), [((0.5, 0.5, 0.5), (91, 91, 91)), ((3.0, 0.5, 0.5), (17, 101, 101))], ids=str
)
@pytest.mark.parametrize(("inner_mm", "outer_mm"), [(18.0, 21.0), (18.0, 19.5)])
def test_concentric_balls_have_the_metrics_of_the_formulas(
    inner_mm: float, outer_mm: float, spacing_mm: Spacing, shape: tuple[int, int, int]
) -> None:
    # Lengths within half a voxel's diagonal on either surface, volumes within 2%, Dice within 0.02, thirds (cut at a
    # whole slice) within 0.04.
    small, large = (ball(radius_mm, spacing_mm=spacing_mm, shape=shape) for radius_mm in (inner_mm, outer_mm))
    result = case_metrics(small, large, spacing_mm=spacing_mm)
    small_ml, large_ml = (4 / 3 * math.pi * radius_mm**3 / 1000 for radius_mm in (inner_mm, outer_mm))
    assert result.volume_reference_ml == pytest.approx(small_ml, rel=0.02)
    assert result.volume_predicted_ml == pytest.approx(large_ml, rel=0.02)
    assert result.volume_difference_ml == pytest.approx(large_ml - small_ml, abs=0.02 * (small_ml + large_ml))
    assert result.volume_difference_percent == pytest.approx(100 * (large_ml / small_ml - 1), abs=4)
    assert result.dice == pytest.approx(2 * small_ml / (small_ml + large_ml), abs=0.02)
    assert result.iou == pytest.approx(small_ml / large_ml, abs=0.03)
    voxel_mm = math.hypot(*spacing_mm)
    assert result.hd95_mm == pytest.approx(outer_mm - inner_mm, abs=voxel_mm)
    assert result.assd_mm == pytest.approx(outer_mm - inner_mm, abs=voxel_mm / 2)
    extent = np.count_nonzero(small.any(axis=(1, 2)))
    half_mm = spacing_mm[0] * np.count_nonzero(third_of_slice(extent) == 1) / 2
    mid = [slab_ml(radius_mm, half_mm) for radius_mm in (inner_mm, outer_mm)]
    end = [(small_ml - mid[0]) / 2, (large_ml - mid[1]) / 2]
    assert result.dice_mid == pytest.approx(2 * mid[0] / sum(mid), abs=0.04)
    assert (result.dice_apex, result.dice_base) == pytest.approx((2 * end[0] / sum(end),) * 2, abs=0.04)
    if spacing_mm[0] < 1:  # 2 mm is between the two gaps, by more than the voxels' rounding
        assert result.nsd_2mm == pytest.approx(1.0 if outer_mm - inner_mm < 2 else 0.0, abs=0.01)


def test_two_balls_apart_overlap_in_a_lens() -> None:
    reference = ball(20.0, spacing_mm=SPACING_MM, shape=(17, 121, 121))
    predicted = np.roll(reference, 12, axis=2)  # 6 mm; lens over ball: (4 r + d) (2 r - d)^2 / 16 r^3
    assert dice(reference, predicted) == pytest.approx((80 + 6) * (40 - 6) ** 2 / (16 * 20**3), abs=0.005)


# --- overlap -------------------------------------------------------------------------------------------------------


def test_two_10_mm_cubes_shifted_5_mm_have_dice_one_half_and_iou_one_third() -> None:
    reference = box_mask((14, 20, 30), (2, 12), (5, 15), (5, 15))
    predicted = box_mask((14, 20, 30), (2, 12), (5, 15), (10, 20))
    assert dice(reference, predicted) == 0.5
    assert slice_counts(reference, predicted).iou() == pytest.approx(1 / 3)


def test_volumes_follow_from_voxel_counts() -> None:
    reference = box_mask((10, 40, 40), (2, 6), (10, 30), (10, 30))  # 1,600 voxels of 0.75 mm3 = 1.2 mL
    predicted = box_mask((10, 40, 40), (2, 6), (10, 30), (10, 25))  # 1,200 voxels
    result = case_metrics(reference, predicted, spacing_mm=SPACING_MM)
    assert result.volume_reference_ml == pytest.approx(1.2)
    assert result.volume_predicted_ml == pytest.approx(0.9)
    assert result.volume_difference_ml == pytest.approx(-0.3)
    assert result.volume_difference_percent == pytest.approx(-25.0)


def test_equal_masks_are_perfect() -> None:
    mask = blob(0)
    result = case_metrics(mask, mask, spacing_mm=SPACING_MM)
    assert (result.dice, result.iou, result.nsd_2mm) == (1.0, 1.0, 1.0)
    assert (result.hd95_mm, result.assd_mm, result.volume_difference_ml) == (0.0, 0.0, 0.0)
    assert not result.missed_gland


def test_integer_and_float_masks_give_what_boolean_masks_give() -> None:
    reference, predicted = blob(1), blob(2)
    expected = case_metrics(reference, predicted, spacing_mm=SPACING_MM)
    assert case_metrics(reference.astype(np.uint8), predicted.astype(np.float32), spacing_mm=SPACING_MM) == expected


# --- surface distances ---------------------------------------------------------------------------------------------


def test_surface_is_the_mask_minus_its_erosion_also_at_the_border_of_the_image() -> None:
    mask = box_mask((5, 6, 7), (0, 5), (0, 6), (2, 7)) & blob(3)[:5, :6, :7] | box_mask(
        (5, 6, 7), (0, 4), (0, 5), (3, 7)
    )
    np.testing.assert_array_equal(surface(mask), mask & ~ndimage.binary_erosion(mask))
    assert surface(np.ones((3, 3, 3), dtype=bool)).sum() == 26


def test_distance_of_one_voxel_masks_is_that_of_their_centres() -> None:
    reference = box_mask((10, 20, 20), (2, 3), (4, 5), (6, 7))
    predicted = box_mask((10, 20, 20), (3, 4), (12, 13), (6, 7))  # 3 mm along z, 4 mm along y
    result = case_metrics(reference, predicted, spacing_mm=SPACING_MM)
    assert result.hd95_mm == pytest.approx(5.0)
    assert result.assd_mm == pytest.approx(5.0)
    assert result.nsd_2mm == 0.0


def test_concentric_balls_differ_by_their_radii() -> None:
    spacing_mm = (1.0, 1.0, 1.0)
    small = ball(10.0, spacing_mm=spacing_mm, shape=(41, 41, 41))
    large = ball(15.0, spacing_mm=spacing_mm, shape=(41, 41, 41))
    distances = surface_distances(small, large, spacing_mm=spacing_mm)
    assert hd95_mm(distances) == pytest.approx(5.0, abs=1.0)  # half a voxel on either surface
    assert assd_mm(distances) == pytest.approx(5.0, abs=0.5)


def test_shift_by_one_slice_costs_at_most_one_slice_thickness() -> None:
    reference = ball(20.0, spacing_mm=SPACING_MM, shape=(19, 100, 100))
    predicted = np.roll(reference, 1, axis=0)
    distances = surface_distances(reference, predicted, spacing_mm=SPACING_MM)
    both = np.concatenate(distances)
    assert both.max() <= 3.0
    assert 0.0 < assd_mm(distances) < hd95_mm(distances) <= 3.0


def test_plates_two_slices_apart_are_six_mm_apart_everywhere() -> None:
    reference, predicted = slices_with_gland(3), slices_with_gland(5)
    result = case_metrics(reference, predicted, spacing_mm=SPACING_MM)
    assert (result.hd95_mm, result.assd_mm, result.nsd_2mm, result.dice) == (6.0, 6.0, 0.0, 0.0)


def test_assd_has_equal_weights_for_surface_voxels() -> None:
    reference = box_mask((3, 3, 20), (1, 2), (1, 2), (0, 1))  # one voxel
    predicted = box_mask((3, 3, 20), (1, 2), (1, 2), (0, 5))  # five in a row: 0 1 2 3 4 mm away
    distances = surface_distances(reference, predicted, spacing_mm=(1.0, 1.0, 1.0))
    assert assd_mm(distances) == pytest.approx(10 / 6)
    assert hd95_mm(distances) == pytest.approx(3.8)  # 95th percentile of 0 1 2 3 4


@pytest.mark.parametrize("spacing_mm", [(3.0, 0.5, 0.5), (1.0, 1.0, 1.0), (0.7, 2.0, 0.3), (6.0, 0.1, 1.3)])
def test_distances_equal_those_of_a_distance_map(spacing_mm: Spacing) -> None:
    reference, predicted = blob(4, threshold=1.0), blob(5, threshold=1.5)
    predicted[0, 0, 0] = True  # far from all others: computed with the k-d tree
    distances = surface_distances(reference, predicted, spacing_mm=spacing_mm)
    for source, target, found in ((reference, predicted, distances[0]), (predicted, reference, distances[1])):
        expected = ndimage.distance_transform_edt(~surface(target), sampling=spacing_mm)[surface(source)]
        np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-9)


# --- normalised surface Dice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift_zy", "area", "voxels"), [((1, 0), 0.765, 0.438), ((0, 6), 0.658, 0.835)])
def test_nsd_is_weighted_by_area_and_not_by_voxels(shift_zy: tuple[int, int], area: float, voxels: float) -> None:
    """With thick slices, most surface voxels are at the ends of the gland and most of the area is on its sides."""
    reference = box_mask((14, 60, 44), (2, 12), (10, 50), (2, 42))  # 30 x 20 x 20 mm
    predicted = np.roll(reference, shift_zy, axis=(0, 1))  # by 3 mm, beyond the tolerance
    assert case_metrics(reference, predicted, spacing_mm=SPACING_MM).nsd_2mm == pytest.approx(area, abs=5e-4)
    distances = surface_distances(reference, predicted, spacing_mm=SPACING_MM)
    both = np.concatenate(distances)
    assert np.mean(both <= 2.0) == pytest.approx(voxels, abs=5e-4)


def test_ends_of_a_long_rod_are_the_part_of_its_area_that_a_shift_moves() -> None:
    # 400 mm long, 20 x 20 mm: shifted along by 10 mm, each rod has one of its two ends of 400 mm2 in the open, and of the
    # 80 mm round each end 10 - 2 mm; the other end lies inside the other rod, 8 mm and more from its side but for the rim.
    reference = box_mask((20, 20, 440), (0, 20), (0, 20), (0, 400))
    predicted = np.roll(reference, 10, axis=2)
    one_mm = (1.0, 1.0, 1.0)
    within = 80 * 392 + (400 - 16 * 16)  # of 80 * 400 + 2 * 400; the rim of the inner end is 2 mm wide
    expected = within / (80 * 400 + 2 * 400)
    found = normalised_surface_dice(reference, predicted, spacing_mm=one_mm, tolerance_mm=2.0)
    assert found == pytest.approx(expected, abs=0.003)  # corners and edges are cut


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spacing_mm", [(3.0, 0.5, 0.5), (1.0, 1.0, 1.0), (0.7, 2.0, 0.3), (3.6, 0.402, 0.402)])
@pytest.mark.parametrize("density", [0.03, 0.5, 0.97])
def test_nsd_equals_monais_on_random_masks_of_any_size(density: float, spacing_mm: Spacing) -> None:
    rng = np.random.default_rng(round(100 * density))
    for _ in range(8):
        shape = rng.integers(2, 9, size=3)
        reference, predicted = rng.random(shape) < density, rng.random(shape) < density
        reference.flat[rng.integers(reference.size)] = predicted.flat[rng.integers(predicted.size)] = True
        expected = monai_nsd(reference, predicted, spacing_mm=spacing_mm)
        found = normalised_surface_dice(reference, predicted, spacing_mm=spacing_mm, tolerance_mm=2.0)
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_distance_equal_to_the_tolerance_is_within_it_despite_rounding() -> None:
    reference = box_mask((1, 1, 10), (0, 1), (0, 1), (0, 1))
    predicted = box_mask((1, 1, 10), (0, 1), (0, 1), (3, 4))  # 3 * 0.1 exceeds 0.3 in binary
    spacing_mm = (3.0, 0.1, 0.1)
    assert normalised_surface_dice(reference, predicted, spacing_mm=spacing_mm, tolerance_mm=0.3) == 1.0
    assert normalised_surface_dice(reference, predicted, spacing_mm=spacing_mm, tolerance_mm=0.19) == 0.0


# --- MONAI ---------------------------------------------------------------------------------------------------------


def monai_metrics(reference: np.ndarray, predicted: np.ndarray, *, spacing_mm: Spacing) -> dict[str, float]:
    target, output, spacing = as_batch(reference), as_batch(predicted), list(spacing_mm)
    found = {
        "dice": compute_dice(output, target),
        "iou": compute_iou(output, target),
        "hd95_mm": compute_hausdorff_distance(output, target, include_background=True, percentile=95, spacing=spacing),
        "assd_mm": compute_average_surface_distance(
            output, target, include_background=True, symmetric=True, spacing=spacing
        ),
    }
    nsd = monai_nsd(reference, predicted, spacing_mm=spacing_mm)
    return {name: value.item() for name, value in found.items()} | {"nsd_2mm": nsd}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("spacing_mm", [(3.0, 0.5, 0.5), (3.6, 0.402, 0.402), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_agree_with_monai_on_random_blobs(seed: int, spacing_mm: Spacing) -> None:
    reference, predicted = blob(seed), blob(seed) ^ (blob(seed + 100, threshold=1.8))  # touches the image border too
    result = case_metrics(reference, predicted, spacing_mm=spacing_mm)
    for name, expected in monai_metrics(reference, predicted, spacing_mm=spacing_mm).items():
        # torch.quantile rounds the rank to float32, so that MONAI's HD95 is a little off where it interpolates.
        assert getattr(result, name) == pytest.approx(expected, abs=1e-4 if name == "hd95_mm" else 1e-5), name


def monai_value(
    metric: CumulativeIterationMetric, reference: np.ndarray, predicted: np.ndarray, **spacing: object
) -> float:
    metric(as_batch(predicted), as_batch(reference), **spacing)
    return float(metric.aggregate().item())


PAIRS = {
    "cube, one slice": (BLOCK, np.roll(BLOCK, 1, axis=0)),
    "cube at the border": (BLOCK[1:5, 2:14, 2:], np.roll(BLOCK, -1, axis=2)[1:5, 2:14, 2:]),
    "ball, one slice": [np.roll(ball(18.0, spacing_mm=SPACING_MM, shape=(17, 91, 91)), n, axis=0) for n in (0, 1)],
    "balls": [ball(radius_mm, spacing_mm=SPACING_MM, shape=(17, 101, 101)) for radius_mm in (18.0, 21.0)],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("pair", PAIRS)
def test_every_metric_agrees_with_the_class_of_monai(pair: str) -> None:
    reference, predicted = PAIRS[pair]
    result = case_metrics(reference, predicted, spacing_mm=SPACING_MM)
    overlap_classes = {"dice": DiceMetric(), "iou": MeanIoU()}
    distance_classes = {
        "hd95_mm": HausdorffDistanceMetric(include_background=True, percentile=95),
        "assd_mm": SurfaceDistanceMetric(include_background=True, symmetric=True),
        "nsd_2mm": SurfaceDiceMetric([2.0], include_background=True, use_subvoxels=True),
    }
    theirs = {name: monai_value(metric, reference, predicted) for name, metric in overlap_classes.items()}
    for name, metric in distance_classes.items():
        theirs[name] = monai_value(metric, reference, predicted, spacing=list(SPACING_MM))
    gland = np.flatnonzero(reference.any(axis=(1, 2)))
    nearest = np.clip(np.arange(len(reference)), gland[0], gland[-1]) - gland[0]
    for index, name in enumerate(("dice_apex", "dice_mid", "dice_base")):
        third = (third_of_slice(len(gland))[nearest] == index)[:, None, None]
        theirs[name] = monai_value(DiceMetric(), reference & third, predicted & third)
    # MONAI's quantile rounds the rank to float32.
    assert {name: getattr(result, name) for name in theirs} == pytest.approx(theirs, abs=1e-4)
    difference_vox = monai_value(AbsoluteVolumeDifferenceMetric(include_background=True), reference, predicted)
    # MONAI counts voxels, and drops the sign.
    assert abs(result.volume_difference_ml) == pytest.approx(difference_vox * math.prod(SPACING_MM) / 1000)


@pytest.mark.filterwarnings("ignore")
def test_metrics_are_defined_for_an_empty_reference_unlike_those_of_monai() -> None:
    # DiceMetric and MeanIoU exclude such a case from their mean for any prediction, and SurfaceDiceMetric excludes it if
    # both are empty. Ours are 0 for a prediction without a reference, and 1 if both are empty.
    gland, nothing = slices_with_gland(3, 4, 5), slices_with_gland()
    for predicted, ours in ((gland, 0.0), (nothing, 1.0)):
        theirs = monai_metrics(nothing, predicted, spacing_mm=SPACING_MM)
        result = case_metrics(nothing, predicted, spacing_mm=SPACING_MM)
        assert math.isnan(theirs["dice"])
        assert math.isnan(theirs["iou"])
        assert (result.dice, result.iou, result.nsd_2mm) == (ours, ours, ours)
    assert math.isnan(theirs["nsd_2mm"])


@pytest.mark.filterwarnings("ignore")
def test_a_missed_gland_counts_in_the_mean_unlike_in_monai() -> None:
    gland, nothing = slices_with_gland(3, 4, 5), slices_with_gland()
    theirs = monai_metrics(gland, nothing, spacing_mm=SPACING_MM)
    assert math.isnan(theirs["hd95_mm"])
    assert math.isinf(theirs["assd_mm"])
    metric = HausdorffDistanceMetric(include_background=True, percentile=95)
    metric(torch.cat([as_batch(gland), as_batch(nothing)]), torch.cat([as_batch(gland), as_batch(gland)]))
    assert metric.aggregate().item() == 0.0  # one perfect and one missed case: a mean HD95 of 0 mm
    assert case_metrics(gland, nothing, spacing_mm=SPACING_MM).hd95_mm > 30.0


# --- empty masks ---------------------------------------------------------------------------------------------------


def test_a_missed_gland_has_dice_0_and_the_image_diagonal_as_distance() -> None:
    gland = slices_with_gland(3, 4, 5)
    geometry = Geometry(
        shape_vox=(12, 8, 8), spacing_mm=SPACING_MM, origin_mm=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)
    )
    result = case_metrics(gland, np.zeros_like(gland), spacing_mm=SPACING_MM)
    assert (result.dice, result.iou, result.nsd_2mm) == (0.0, 0.0, 0.0)
    assert result.hd95_mm == pytest.approx(geometry.diagonal_mm)
    assert result.assd_mm == pytest.approx(geometry.diagonal_mm)
    assert (result.dice_apex, result.dice_mid, result.dice_base) == (0.0, 0.0, 0.0)
    assert result.volume_difference_percent == -100.0
    assert result.missed_gland


def test_a_prediction_without_a_reference_is_as_bad_but_not_a_missed_gland() -> None:
    gland = slices_with_gland(3, 4, 5)
    result = case_metrics(np.zeros_like(gland), gland, spacing_mm=SPACING_MM)
    assert (result.dice, result.nsd_2mm) == (0.0, 0.0)
    assert result.hd95_mm == pytest.approx(math.hypot(36.0, 4.0, 4.0))
    assert result.assd_mm == pytest.approx(result.hd95_mm)
    assert math.isnan(result.volume_difference_percent)
    assert math.isnan(result.dice_mid)
    assert not result.missed_gland


def test_two_empty_masks_agree() -> None:
    nothing = slices_with_gland()
    result = case_metrics(nothing, nothing, spacing_mm=SPACING_MM)
    assert (result.dice, result.iou, result.nsd_2mm) == (1.0, 1.0, 1.0)
    assert (result.hd95_mm, result.assd_mm, result.volume_difference_percent) == (0.0, 0.0, 0.0)
    assert not result.missed_gland


# --- thirds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_slices", "parted"),
    [(1, (0, 1, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (1, 2, 1)), (5, (2, 1, 2)), (6, (2, 2, 2)), (14, (5, 4, 5))],
)
def test_slices_belong_to_the_third_with_their_centre(num_slices: int, parted: tuple[int, int, int]) -> None:
    assert tuple(np.bincount(third_of_slice(num_slices), minlength=3)) == parted


def test_dice_by_thirds_counts_each_third_alone() -> None:
    reference = slices_with_gland(3, 4, 5, 6, 7, 8)
    predicted = slices_with_gland(4, 5, 6)
    apex, mid, base = dice_by_thirds(slice_counts(reference, predicted))
    assert apex == pytest.approx(2 / 3)  # one of the two slices
    assert mid == 1.0
    assert base == 0.0


def test_the_inferior_third_is_the_apex() -> None:
    reference = slices_with_gland(3, 4, 5)
    assert dice_by_thirds(slice_counts(reference, slices_with_gland(3))) == (1.0, 0.0, 0.0)


def test_over_segmentation_beyond_the_base_lowers_dice_of_the_base() -> None:
    reference = slices_with_gland(3, 4, 5)
    apex, mid, base = dice_by_thirds(slice_counts(reference, slices_with_gland(3, 4, 5, 6, 7)))
    assert (apex, mid) == (1.0, 1.0)
    assert base == pytest.approx(0.5)  # 2 * 1 / (1 + 3)


def test_over_segmentation_below_the_apex_lowers_dice_of_the_apex() -> None:
    reference = slices_with_gland(3, 4, 5)
    apex, mid, base = dice_by_thirds(slice_counts(reference, slices_with_gland(2, 3, 4, 5)))
    assert apex == pytest.approx(2 / 3)
    assert (mid, base) == (1.0, 1.0)


def test_thirds_without_slices_have_no_dice() -> None:
    two, one = slices_with_gland(3, 4), slices_with_gland(3)
    assert dice_by_thirds(slice_counts(two, two)) == (1.0, pytest.approx(math.nan, nan_ok=True), 1.0)
    apex, mid, base = dice_by_thirds(slice_counts(one, one))
    assert math.isnan(apex)
    assert mid == 1.0
    assert math.isnan(base)


# --- pooled IoU ----------------------------------------------------------------------------------------------------


def test_pooled_iou_counts_gland_slices_of_all_cases_together() -> None:
    # Slices 5 and 6 are excluded.
    first = slice_counts(slices_with_gland(3, 4), slices_with_gland(4, 5, 6))  # 16 of 32 voxels
    second = slice_counts(slices_with_gland(1, 2, 3), slices_with_gland(1, 2, 3))  # 48 of 48
    assert pooled_iou([first]) == pytest.approx(16 / 32)
    assert pooled_iou([first, second]) == pytest.approx(64 / 80)


def test_pooled_iou_without_a_gland_slice_is_refused() -> None:
    nothing = slices_with_gland()
    with pytest.raises(ValueError, match="got none in 1 cases"):
        pooled_iou([slice_counts(nothing, slices_with_gland(2))])


# --- refusals ------------------------------------------------------------------------------------------------------


def test_masks_of_different_shape_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(4, 8, 8\) and \(4, 8, 9\)"):
        case_metrics(np.zeros((4, 8, 8), bool), np.zeros((4, 8, 9), bool), spacing_mm=SPACING_MM)


def test_masks_without_three_axes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"three axes.*\(8, 8\)"):
        dice(np.zeros((8, 8), bool), np.zeros((8, 8), bool))


@pytest.mark.parametrize("value", [2, 0.7, math.nan, -1])
def test_values_other_than_0_and_1_are_refused(value: float) -> None:
    mask = slices_with_gland(3)
    predicted = mask.astype(float)
    predicted[3, 3, 3] = value
    with pytest.raises(ValueError, match="predicted mask must hold 0 and 1 only"):
        case_metrics(mask, predicted, spacing_mm=SPACING_MM)


@pytest.mark.parametrize("spacing_mm", [(3.0, 0.5), (3.0, 0.0, 0.5), (3.0, -0.5, 0.5), (math.nan, 0.5, 0.5)])
def test_spacing_that_is_not_three_positive_lengths_is_refused(spacing_mm: Spacing) -> None:
    mask = slices_with_gland(3)
    with pytest.raises(ValueError, match="three positive lengths"):
        case_metrics(mask, mask, spacing_mm=spacing_mm)
