"""The contact sheet shows the slice with most gland, on a true scale, and bad cases before good ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prostate_seg.imaging.geometry import Volume
from prostate_seg.reporting.contact_sheet import (
    MAX_PANELS,
    Panel,
    choose_panels,
    draw_contact_sheet,
    picture_of,
)


def panel(number: int, *, is_error: bool = False, is_warning: bool = False) -> Panel:
    return Panel(case_id=f"{number:03d}", caption=[], picture=None, is_error=is_error, is_warning=is_warning)


def test_the_slice_with_most_gland_is_shown_around_the_gland(cube_volume: Volume) -> None:
    gland = np.zeros(cube_volume.array.shape, bool)
    gland[6, 10:14, 30:34] = True
    gland[7, 10:20, 30:40] = True
    picture = picture_of(cube_volume, gland)
    assert picture.gland is not None
    assert picture.gland.sum() == 100
    assert picture.spacing_mm == (0.5, 0.5)
    assert (picture.grey.min(), picture.grey.max()) == (0, 255)


def test_without_gland_the_middle_slice_is_shown(cube_volume: Volume) -> None:
    marked = cube_volume.array.copy()
    marked[10] = 0
    marked[10, 20:40, 20:40] = 50
    picture = picture_of(replace(cube_volume, array=marked), None)
    assert picture.gland is None
    assert np.mean(picture.grey) == pytest.approx(255 * 20 * 20 / 60**2)


@pytest.mark.parametrize("centre", [(2, 2), (300, 395)])
def test_a_gland_at_the_edge_of_a_large_slice_is_shown_within_the_field(
    cube_volume: Volume, centre: tuple[int, int]
) -> None:
    grid = replace(cube_volume.geometry, shape_vox=(3, 302, 397))
    gland = np.zeros(grid.shape_vox, bool)
    gland[1, centre[0] - 1 : centre[0] + 1, centre[1] - 1 : centre[1] + 1] = True
    image = Volume(array=np.random.default_rng(0).random(grid.shape_vox), geometry=grid)
    picture = picture_of(image, gland)
    assert picture.grey.shape == (120, 120)
    assert picture.spacing_mm == (1.0, 1.0)
    assert picture.gland is not None
    assert picture.gland.any()


def test_a_constant_image_has_a_picture_too(cube_volume: Volume) -> None:
    assert not picture_of(replace(cube_volume, array=np.full((4, 9, 9), 7)), None).grey.any()


def test_a_sheet_has_all_errors_then_warnings_then_an_even_choice_in_order() -> None:
    panels = [panel(n, is_error=n % 50 == 0, is_warning=n % 20 == 1) for n in range(400)]
    chosen = choose_panels(panels)
    assert len(chosen) == MAX_PANELS
    assert [one.case_id for one in chosen] == sorted(one.case_id for one in chosen)
    assert sum(one.is_error for one in chosen) == 8
    assert sum(one.is_warning for one in chosen) == 20
    good = [int(one.case_id) for one in chosen if not one.is_error and not one.is_warning]
    assert (good[0], good[-1]) == (2, 399)
    assert len(choose_panels([panel(n, is_error=True) for n in range(400)])) == MAX_PANELS
    assert choose_panels(panels[:5]) == panels[:5]


def test_panels_are_drawn_in_rows_with_coloured_frames(tmp_path: Path, cube_volume: Volume) -> None:
    gland = cube_volume.array > 50
    good = replace(panel(1), case_id="Müller_$x$_前列腺" * 4, caption=["44 mL"], picture=picture_of(cube_volume, gland))
    bad = replace(panel(2, is_error=True), caption=["lfs_pointer", "..."])
    path = tmp_path / "sheet.png"
    draw_contact_sheet(path, [good] * 7 + [bad], title="$data")
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert image.shape[1] == pytest.approx(1155, abs=2)
    assert image.shape[0] == pytest.approx(539, abs=2)
    vermilion = np.abs(image - (0xD5, 0x5E, 0x00)).max(axis=2) < 12
    columns = np.flatnonzero(vermilion.any(axis=0))
    assert vermilion.sum() > 1000
    assert (columns.min(), columns.max()) == (pytest.approx(1155 / 6, abs=20), pytest.approx(1155 / 3, abs=20))
