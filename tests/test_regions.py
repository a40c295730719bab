"""Regions of a mask as bits, and the label map that a network's probabilities give: zones never leave the gland."""

import numpy as np
import pytest

from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.regions import Regions, label_map_of, masks_of_bits, region_bits, region_masks

ZONES: Regions = {"whole_gland": (1, 2), "peripheral_zone": (2,), "transition_zone": (1,)}
SWAPPED: Regions = {"whole_gland": (1, 2), "peripheral_zone": (1,), "transition_zone": (2,)}


def test_bits_are_the_masks_of_the_regions_whatever_the_numbers_of_the_labels() -> None:
    labels = np.array([[[0, 1, 2]]])
    np.testing.assert_array_equal(region_bits(labels, ZONES), [[[0, 0b101, 0b011]]])
    np.testing.assert_array_equal(region_bits(np.array([[[0, 2, 1]]]), SWAPPED), region_bits(labels, ZONES))
    for regions in (ZONES, SWAPPED):
        bits = region_bits(labels, regions)
        np.testing.assert_array_equal(masks_of_bits(bits, num_regions=3), region_masks(labels, regions))


def test_whole_gland_alone_is_zero_or_one() -> None:
    labels = np.array([[[0, 1, 2, 7]]], dtype=np.int32)
    np.testing.assert_array_equal(region_bits(labels, {"whole_gland": None}), [[[0, 1, 1, 1]]])
    np.testing.assert_array_equal(region_bits(labels, {"whole_gland": (7,)}), [[[0, 0, 0, 1]]])
    gland = np.array([[[False, True]]])
    label_map = label_map_of(gland, np.full((1, 1, 1, 2), 0.9), {"whole_gland": (7,)})
    assert (label_map.dtype, label_map.tolist()) == (np.uint8, [[[0, 1]]])


def test_every_voxel_of_the_gland_gets_its_most_probable_label_and_no_other_voxel_gets_one() -> None:
    gland = np.array([[[True, True, True, False]]])
    # Of the gland, the peripheral and the transition zone: clear, both unlikely, both likely, and a zone outside the gland.
    probability = np.array([[[[0.9, 0.9, 0.9, 0.1]]], [[[0.8, 0.2, 0.7, 0.99]]], [[[0.1, 0.3, 0.6, 0.2]]]])
    np.testing.assert_array_equal(label_map_of(gland, probability, ZONES), [[[2, 1, 2, 0]]])
    np.testing.assert_array_equal(label_map_of(gland, probability, SWAPPED), [[[1, 2, 1, 0]]])


def test_gland_that_is_in_no_zone_has_a_label_of_its_own() -> None:
    regions: Regions = {"whole_gland": (1, 2, 3), "peripheral_zone": (2,)}  # 1 and 3 are in the same regions
    probability = np.array([[[[0.9, 0.9]]], [[[0.4, 0.6]]]])
    np.testing.assert_array_equal(label_map_of(np.ones((1, 1, 2), dtype=bool), probability, regions), [[[1, 2]]])


def test_certain_probabilities_and_labels_of_16_bits_are_used(cube_volume: Volume) -> None:
    regions: Regions = {"whole_gland": (1000, 2000), "peripheral_zone": (2000,), "transition_zone": (1000,)}
    probability = np.array([[[[1.0, 1.0]]], [[[1.0, 0.0]]], [[[0.0, 1.0]]]])
    label_map = label_map_of(np.ones((1, 1, 2), dtype=bool), probability, regions)
    np.testing.assert_array_equal(label_map, [[[2000, 1000]]])
    assert cube_volume.with_mask(label_map).array.max() == 2000


@pytest.mark.parametrize("regions", [ZONES, SWAPPED])
def test_masks_of_a_label_map_are_inside_the_gland(regions: Regions) -> None:
    rng = np.random.default_rng(0)
    probability = rng.random((3, 4, 8, 8))
    masks = region_masks(label_map_of(probability[0] > 0.5, probability, regions), regions)
    np.testing.assert_array_equal(masks[0], probability[0] > 0.5)
    np.testing.assert_array_equal(masks[1] ^ masks[2], masks[0])
