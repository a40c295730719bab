"""Voxel grids: index and world coordinates, corners, equality and bounding boxes."""

from dataclasses import replace

import numpy as np
import pytest

from prostate_seg.imaging.geometry import Geometry, bounding_box
from tests.imaging_helpers import rotate

GRID = Geometry(
    shape_vox=(20, 384, 384),
    spacing_mm=(3.0, 0.5, 0.25),
    origin_mm=(10.0, -20.0, 30.0),
    direction=(1, 0, 0, 0, 1, 0, 0, 0, 1),
)


def test_index_zyx_becomes_world_xyz_by_hand() -> None:
    np.testing.assert_allclose(GRID.to_world((2, 4, 8)), (10 + 8 * 0.25, -20 + 4 * 0.5, 30 + 2 * 3))


def test_world_and_index_are_inverse_on_an_oblique_grid() -> None:
    oblique = rotate(GRID, degrees=33)
    points = np.random.default_rng(0).uniform(0, 20, size=(7, 3))
    np.testing.assert_allclose(oblique.to_index(oblique.to_world(points)), points, atol=1e-9)


def test_volume_of_a_voxel_and_diagonal_by_hand() -> None:
    assert GRID.voxel_volume_ml == pytest.approx(3.0 * 0.5 * 0.25 / 1000)
    assert GRID.diagonal_mm == pytest.approx(np.sqrt(60**2 + 192**2 + 96**2))


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({}, True),
        ({"origin_mm": (10.02, -20.0, 30.0)}, True),  # rounding of a header
        ({"origin_mm": (10.125, -20.0, 30.0)}, False),  # half a voxel
        ({"spacing_mm": (3.0, 0.5, 0.255)}, False),  # 384 voxels drift by 1.9 mm
        ({"shape_vox": (19, 384, 384)}, False),
    ],
)
def test_grids_are_equal_up_to_rounding(change: dict, is_same: bool) -> None:
    assert GRID.is_same_grid(replace(GRID, **change)) is is_same


def test_rotations_are_equal_up_to_float32_rounding() -> None:
    turned = {degrees: replace(rotate(GRID, degrees=degrees), origin_mm=GRID.origin_mm) for degrees in (0.02, 0.5)}
    assert GRID.is_same_grid(turned[0.02])
    assert not GRID.is_same_grid(turned[0.5])


def test_bounding_box_is_the_smallest_and_that_of_an_empty_mask_is_empty() -> None:
    mask = np.zeros((9, 9, 9), dtype=bool)
    mask[2:5, 1:3, 4:9] = True
    assert bounding_box(mask) == (slice(2, 5), slice(1, 3), slice(4, 9))
    assert mask[bounding_box(np.zeros_like(mask))].size == 0
