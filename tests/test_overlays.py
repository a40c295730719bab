"""Overlays and contact sheets: content, orientation and scale, for every kind of image and mask."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from prostate_seg.imaging.geometry import Spacing, Volume
from prostate_seg.reporting.figures.overlays import (
    MAX_PANELS,
    PREDICTED_COLOUR,
    REFERENCE_COLOUR,
    Panel,
    RegionMasks,
    choose_panels,
    contact_sheet_figure,
    crop_around,
    overlay_figure,
    overlay_title,
    picture_of,
    printable,
    slice_indices,
)
from prostate_seg.reporting.figures.plots import save_png
from prostate_seg.segmentation.metrics import case_metrics

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # Python 3.13 warns of a connection to a store that another test left to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]

SPACING_MM: Spacing = (3.0, 1.0, 1.0)


@pytest.fixture
def reference() -> np.ndarray:
    mask = np.zeros((16, 90, 100), dtype=bool)
    mask[4:12, 30:60, 35:65] = True
    return mask


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, size=(16, 90, 100)).astype(np.float32)


def write(path: Path, image: np.ndarray, reference: np.ndarray, predicted: np.ndarray) -> Path:
    metrics = case_metrics(reference, predicted, spacing_mm=SPACING_MM)
    title = overlay_title(path.stem, metrics)
    save_png(path, figure_of(image, reference, predicted, title=title))
    return path


def figure_of(
    image: np.ndarray,
    reference: np.ndarray | None,
    predicted: np.ndarray,
    *,
    title: str = "case",
    spacing_mm: Spacing = SPACING_MM,
) -> Figure:
    gland = RegionMasks(name="whole_gland", predicted=predicted, reference=reference)
    return overlay_figure(image, [gland], spacing_mm=spacing_mm, title=title)


def contour_colours(figure: Figure, panel: int) -> list[str]:
    return [
        to_hex(np.atleast_2d(contour.get_edgecolor())[0].tolist()).upper() for contour in figure.axes[panel].collections
    ]


# --- overlays ------------------------------------------------------------------------------------------------------


def test_overlay_is_a_png_and_leaves_nothing_else(tmp_path: Path, image: np.ndarray, reference: np.ndarray) -> None:
    path = write(tmp_path / "overlays" / "p1_1.png", image, reference, np.roll(reference, 4, axis=2))
    assert [found.name for found in path.parent.iterdir()] == ["p1_1.png"]
    pixels = imread(path)
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.1


def test_panels_run_from_below_the_apex_to_above_the_base(image: np.ndarray, reference: np.ndarray) -> None:
    figure = figure_of(image, reference, reference)
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert labels[0] == "z = 3   no gland"
    assert labels[-1] == "z = 12   no gland"
    assert labels[1:-1] == [f"z = {index}   Dice 1.00" for index in (5, 7, 8, 10)]


def test_slice_dice_under_a_panel_is_that_of_the_slice(image: np.ndarray, reference: np.ndarray) -> None:
    predicted = np.roll(reference, 15, axis=2)  # by half the width of the block
    assert figure_of(image, reference, predicted).axes[2].get_xlabel() == "z = 7   Dice 0.50"


def test_both_contours_are_drawn_in_their_colours(image: np.ndarray, reference: np.ndarray) -> None:
    figure = figure_of(image, reference, np.roll(reference, 4, axis=1))
    assert contour_colours(figure, 0) == []
    assert contour_colours(figure, 2) == [REFERENCE_COLOUR, PREDICTED_COLOUR]


def test_a_mask_without_reference_is_drawn_alone(image: np.ndarray, reference: np.ndarray) -> None:
    figure = figure_of(image, None, reference)
    assert [ax.get_xlabel() for ax in figure.axes][:2] == ["z = 3   no gland", "z = 5"]
    assert contour_colours(figure, 2) == [PREDICTED_COLOUR]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["predicted"]


def test_an_empty_prediction_is_marked_in_the_legend_and_in_the_title(
    tmp_path: Path, image: np.ndarray, reference: np.ndarray
) -> None:
    nothing = np.zeros_like(reference)
    figure = figure_of(image, reference, nothing)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["reference", "predicted (empty)"]
    assert contour_colours(figure, 2) == [REFERENCE_COLOUR]
    assert overlay_title("p1", case_metrics(reference, nothing, spacing_mm=SPACING_MM)).endswith("gland missed")
    assert write(tmp_path / "missed.png", image, reference, nothing).stat().st_size > 0


def test_two_empty_masks_show_the_whole_volume(tmp_path: Path, image: np.ndarray, reference: np.ndarray) -> None:
    nothing = np.zeros_like(reference)
    figure = figure_of(image, nothing, nothing)
    assert tuple(figure.axes[0].get_images()[0].get_size()) == (90, 100)
    assert write(tmp_path / "nothing.png", image, nothing, nothing).exists()


def test_a_mask_that_fills_the_image_and_a_constant_image_are_drawn(tmp_path: Path) -> None:
    full = np.ones((4, 30, 30), dtype=bool)
    assert write(tmp_path / "full.png", np.zeros((4, 30, 30)), full, full).exists()


def test_case_ids_in_any_script_and_with_dollars_are_drawn(
    tmp_path: Path, image: np.ndarray, reference: np.ndarray
) -> None:
    path = write(tmp_path / "Ασθενής_Ö_病人_$x_1$.png", image, reference, reference)
    assert path.exists()
    title = figure_of(image, reference, reference).texts[0]
    assert not title.get_parse_math()  # dollars are letters here, not the start of a formula


def test_characters_without_a_glyph_are_written_as_escapes() -> None:
    assert printable("Ασθενής_Ö1 Дж") == "Ασθενής_Ö1 Дж"
    assert printable("病人_1") == r"\u75c5\u4eba_1"


def test_a_long_title_stays_within_the_figure(image: np.ndarray, reference: np.ndarray) -> None:
    figure = figure_of(image, reference, reference, title="1.2.840.113619." * 8)
    figure.draw_without_rendering()
    title = figure.texts[0].get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.width


def test_pixels_keep_their_aspect_on_anisotropic_slices(image: np.ndarray, reference: np.ndarray) -> None:
    figure = figure_of(image, reference, reference, spacing_mm=(3.0, 1.0, 0.5))
    assert figure.axes[0].get_aspect() == 2.0


def test_overlays_can_be_drawn_in_threads(tmp_path: Path, image: np.ndarray, reference: np.ndarray) -> None:
    paths = [tmp_path / f"case{number}.png" for number in range(2)]
    threads = [threading.Thread(target=write, args=(path, image, reference, reference)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths[0].exists()
    np.testing.assert_array_equal(imread(paths[0])[60:], imread(paths[1])[60:])  # below the title


def test_slices_are_evenly_spaced_and_stay_within_the_volume() -> None:
    mask = np.zeros((20, 4, 4), dtype=bool)
    mask[5:16] = True
    assert slice_indices(mask, num_slices=7) == [4, 6, 8, 10, 12, 14, 16]
    assert slice_indices(mask[5:16], num_slices=3) == [0, 5, 10]
    assert slice_indices(mask[5:8], num_slices=6) == [0, 1, 2]
    assert slice_indices(np.zeros((5, 4, 4), dtype=bool), num_slices=5) == [0, 1, 2, 3, 4]


def test_the_crop_leaves_20_mm_around_the_mask_within_the_image() -> None:
    mask = np.zeros((3, 200, 200), dtype=bool)
    mask[1, 10:50, 100:120] = True
    assert crop_around(mask, spacing_mm=(3.0, 0.5, 0.8)) == (slice(0, 90), slice(75, 145))


def test_an_image_of_another_shape_is_refused_with_both_shapes(
    tmp_path: Path, image: np.ndarray, reference: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=r"\(15, 90, 100\) and \(16, 90, 100\)"):
        write(tmp_path / "case.png", image[1:], reference, reference)
    assert list(tmp_path.iterdir()) == []


# --- contact sheet -------------------------------------------------------------------------------------------------


def panel(number: int, severity: int = 0) -> Panel:
    return Panel(case_id=f"{number:03d}", caption=[], picture=None, severity=severity)


def test_the_slice_with_most_gland_is_shown_around_the_gland(cube_volume: Volume) -> None:
    gland = np.zeros(cube_volume.array.shape, bool)
    gland[6, 10:14, 30:34] = True
    gland[7, 10:20, 30:40] = True
    picture = picture_of(cube_volume, [gland])
    assert picture.masks[0].sum() == 100
    assert picture.spacing_mm == (0.5, 0.5)
    assert (picture.grey.min(), picture.grey.max()) == (0, 255)


def test_without_gland_the_middle_slice_is_shown(cube_volume: Volume) -> None:
    marked = cube_volume.array.copy()
    marked[10] = 0
    marked[10, 20:40, 20:40] = 50
    picture = picture_of(replace(cube_volume, array=marked), [])
    assert picture.masks == []
    assert np.mean(picture.grey) == pytest.approx(255 * 20 * 20 / 60**2)


@pytest.mark.parametrize("centre", [(2, 2), (300, 395)])
def test_a_gland_at_the_edge_of_a_large_slice_is_shown_within_the_field(
    cube_volume: Volume, centre: tuple[int, int]
) -> None:
    grid = replace(cube_volume.geometry, shape_vox=(3, 302, 397))
    gland = np.zeros(grid.shape_vox, bool)
    gland[1, centre[0] - 1 : centre[0] + 1, centre[1] - 1 : centre[1] + 1] = True
    image = Volume(array=np.random.default_rng(0).random(grid.shape_vox), geometry=grid)
    picture = picture_of(image, [gland])
    assert picture.grey.shape == (120, 120)
    assert picture.spacing_mm == (1.0, 1.0)
    assert picture.masks[0].any()


def test_a_constant_image_is_drawn(cube_volume: Volume) -> None:
    assert not picture_of(replace(cube_volume, array=np.full((4, 9, 9), 7)), []).grey.any()


def test_a_contact_sheet_has_errors_then_warnings_then_an_even_selection() -> None:
    panels = [panel(n, 2 if n % 50 == 0 else int(n % 20 == 1)) for n in range(400)]
    chosen = choose_panels(panels)
    assert len(chosen) == MAX_PANELS
    assert [one.case_id for one in chosen] == sorted(one.case_id for one in chosen)
    assert sum(one.severity == 2 for one in chosen) == 8
    assert sum(one.severity == 1 for one in chosen) == 20
    good = [int(one.case_id) for one in chosen if one.severity == 0]
    assert (good[0], good[-1]) == (2, 399)
    assert len(choose_panels([panel(n, 2) for n in range(400)])) == MAX_PANELS
    assert choose_panels(panels[:5]) == panels[:5]


def test_panels_are_drawn_in_rows_with_coloured_frames(tmp_path: Path, cube_volume: Volume) -> None:
    gland = cube_volume.array > 50
    good = replace(
        panel(1), case_id="Müller_$x$_前列腺" * 4, caption=["44 mL"], picture=picture_of(cube_volume, [gland])
    )
    bad = replace(panel(2, 2), caption=["lfs_pointer", "..."])
    path = tmp_path / "sheet.png"
    save_png(path, contact_sheet_figure([good] * 7 + [bad], title="$data"))
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert image.shape[1] == pytest.approx(1155, abs=2)
    assert image.shape[0] == pytest.approx(539, abs=2)
    vermilion = np.abs(image - (0xD5, 0x5E, 0x00)).max(axis=2) < 12
    columns = np.flatnonzero(vermilion.any(axis=0))
    assert vermilion.sum() > 1000
    assert (columns.min(), columns.max()) == (pytest.approx(1155 / 6, abs=20), pytest.approx(1155 / 3, abs=20))
