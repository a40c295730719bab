"""The grid chosen from a data set: medians, a window with a margin, and the rules of nnU-Net and Auto3DSeg beside them."""

import numpy as np
import pytest

from prostate_seg.imaging.geometry import Geometry, Spacing
from prostate_seg.imaging.settings import PreprocessConfig
from prostate_seg.imaging.target_grid import (
    StudyExtent,
    auto3dseg_spacing_mm,
    auto_image_size,
    auto_names,
    auto_spacing_mm,
    choose_grid,
    nnunet_spacing_mm,
    study_extent,
)

CONFIG = PreprocessConfig(
    spacing_mm="auto", image_size="auto", crop="center", to_8bit=True, intensity_percentiles=(0.5, 99.5)
)


def study(spacing_mm: Spacing, *, reach_mm: float = 30.0, edge_mm: float = 50.0) -> StudyExtent:
    return StudyExtent(spacing_mm=spacing_mm, gland_reach_mm=reach_mm, gland_edge_mm=edge_mm)


def test_extent_is_measured_from_the_centre_of_the_image() -> None:
    grid = Geometry.from_xyz((40, 20, 4), (0.5, 1.0, 3.0), origin_mm=(0, 0, 0), direction=np.eye(3))
    gland = np.zeros(grid.shape_vox, dtype=bool)
    gland[1:3, 8:17, 22:26] = True  # along y 9 mm long, from -2 to 7 mm; along x 2 mm long, from 1 to 3 mm
    assert study_extent(gland, grid) == StudyExtent(spacing_mm=(3.0, 1.0, 0.5), gland_reach_mm=7.0, gland_edge_mm=9.0)


def test_auto_spacing_is_the_median_but_no_finer_than_its_bound_in_plane() -> None:
    coarse = [study((3.6, 0.9, 0.9)), study((3.58, 1.12, 1.12)), study((4.0, 1.4, 1.4))]
    assert auto_spacing_mm(coarse) == (3.6, 1.1, 1.1)
    fine = [study((3.0, 0.3, 0.3)), study((3.0, 0.4, 0.4))]
    assert auto_spacing_mm(fine) == (3.0, 0.8, 0.8)


def test_auto_image_size_contains_every_gland_with_a_margin() -> None:
    studies = [study((3, 0.5, 0.5), reach_mm=30), study((3, 0.5, 0.5), reach_mm=45, edge_mm=60)]
    assert auto_image_size(studies, spacing_mm=(3, 1, 1), crop="center") == 112  # 2 x (45 + 10) = 110
    assert auto_image_size(studies, spacing_mm=(3, 1, 1), crop="mask") == 80  # 60 + 2 x 10, whatever the position
    assert auto_image_size(studies, spacing_mm=None, crop="mask") == 160  # in voxels of 0.5 mm


@pytest.mark.parametrize(
    ("spacing_mm", "image_size", "chosen"),
    [
        ("auto", "auto", {"spacing_mm": (3.0, 1.0, 1.0), "image_size": 80}),
        ("auto", 96, {"spacing_mm": (3.0, 1.0, 1.0)}),
        ((3.0, 0.5, 0.5), "auto", {"image_size": 160}),
        ((3.0, 0.5, 0.5), 96, {}),
    ],
)
def test_only_what_is_auto_is_chosen(spacing_mm: Spacing, image_size: int, chosen: dict[str, object]) -> None:
    config = PreprocessConfig(
        spacing_mm=spacing_mm, image_size=image_size, crop="center", to_8bit=True, intensity_percentiles=(0.5, 99.5)
    )
    assert choose_grid(config, [study((3.0, 1.0, 1.0))]) == chosen
    assert auto_names(config) == list(chosen)


def test_a_study_more_or_less_seldom_changes_the_grid() -> None:
    rng = np.random.default_rng(0)
    studies = [study((3.0, mm, mm), reach_mm=40) for mm in rng.normal(1.0, 0.02, 20)]
    grids = {str(choose_grid(CONFIG, studies[:index] + studies[index + 1 :])) for index in range(20)}
    assert len(grids) == 1


def test_nnunet_takes_the_tenth_percentile_along_an_anisotropic_axis() -> None:
    spacings = [(3.0 + 0.1 * index, 0.5, 0.5) for index in range(11)]
    assert nnunet_spacing_mm(spacings, shapes_vox=[(20, 300, 300)] * 11) == pytest.approx((3.1, 0.5, 0.5))
    assert nnunet_spacing_mm(spacings, shapes_vox=[(120, 300, 300)] * 11) == pytest.approx((3.5, 0.5, 0.5))
    nearly_isotropic = [(1.2, 0.5, 0.5), (1.4, 0.5, 0.5)]
    assert nnunet_spacing_mm(nearly_isotropic, shapes_vox=[(60, 300, 300)] * 2) == pytest.approx((1.3, 0.5, 0.5))


def test_auto3dseg_resamples_only_data_sets_of_different_spacings() -> None:
    assert auto3dseg_spacing_mm([(3.0, 0.5, 0.5), (3.0, 0.6, 0.6)]) is None
    assert auto3dseg_spacing_mm([(3.0, 0.5, 0.5), (3.0, 0.5, 0.5), (3.0, 1.2, 1.2)]) == (3.0, 0.5, 0.5)
