"""Overlays and metric plots: what is drawn where, and that a PNG comes out for every case there can be."""

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from prostate_seg.imaging.geometry import Spacing
from prostate_seg.reporting.overlays import (
    PREDICTED_COLOUR,
    REFERENCE_COLOUR,
    case_metrics_figure,
    crop_around,
    draw_case_metrics,
    draw_overlay,
    overlay_figure,
    overlay_title,
    printable,
    slice_indices,
)
from prostate_seg.segmentation.metrics import case_metrics

pytestmark = pytest.mark.filterwarnings("error")

SPACING_MM: Spacing = (3.0, 1.0, 1.0)


@pytest.fixture
def reference() -> np.ndarray:
    mask = np.zeros((16, 90, 100), dtype=bool)
    mask[4:12, 30:60, 35:65] = True
    return mask


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, size=(16, 90, 100)).astype(np.float32)


def write(path: Path, image: np.ndarray, reference: np.ndarray, predicted: np.ndarray, *, num_slices: int = 6) -> Path:
    metrics = case_metrics(reference, predicted, spacing_mm=SPACING_MM)
    draw_overlay(
        path,
        image=image,
        reference=reference,
        predicted=predicted,
        spacing_mm=SPACING_MM,
        title=overlay_title(path.stem, metrics),
        num_slices=num_slices,
    )
    return path


def figure_of(image: np.ndarray, reference: np.ndarray, predicted: np.ndarray, **settings: int) -> Figure:
    return overlay_figure(
        image, reference, predicted, spacing_mm=SPACING_MM, title="case", num_slices=settings.get("num_slices", 6)
    )


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


def test_an_empty_prediction_is_said_in_the_legend_and_in_the_title(
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
    path = write(tmp_path / "Ασθενής_Ö_病人_$x_1$.png", image, reference, reference, num_slices=1)
    assert path.exists()
    title = figure_of(image, reference, reference).texts[0]
    assert not title.get_parse_math()  # dollars are letters here, not the start of a formula


def test_characters_without_a_glyph_are_written_as_escapes() -> None:
    assert printable("Ασθενής_Ö1 Дж") == "Ασθενής_Ö1 Дж"
    assert printable("病人_1") == r"\u75c5\u4eba_1"


def test_a_long_title_stays_within_the_figure(image: np.ndarray, reference: np.ndarray) -> None:
    figure = overlay_figure(
        image, reference, reference, spacing_mm=SPACING_MM, title="1.2.840.113619." * 8, num_slices=1
    )
    figure.draw_without_rendering()
    title = figure.texts[0].get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.width


def test_pixels_keep_their_aspect_on_anisotropic_slices(image: np.ndarray, reference: np.ndarray) -> None:
    figure = overlay_figure(image, reference, reference, spacing_mm=(3.0, 1.0, 0.5), title="case", num_slices=2)
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
    assert slice_indices(mask, num_slices=1) == [10]
    assert slice_indices(mask[5:16], num_slices=3) == [0, 5, 10]
    assert slice_indices(mask[5:8], num_slices=6) == [0, 1, 2]
    assert slice_indices(np.zeros((5, 4, 4), dtype=bool), num_slices=5) == [0, 1, 2, 3, 4]


def test_the_crop_leaves_20_mm_around_the_mask_within_the_image() -> None:
    mask = np.zeros((3, 200, 200), dtype=bool)
    mask[1, 10:50, 100:120] = True
    assert crop_around(mask, spacing_mm=(3.0, 0.5, 0.8)) == (slice(0, 90), slice(75, 145))


def test_no_slices_are_refused(reference: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        slice_indices(reference, num_slices=0)


def test_an_image_of_another_shape_is_refused_with_both_shapes(
    tmp_path: Path, image: np.ndarray, reference: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=r"\(15, 90, 100\) and \(16, 90, 100\)"):
        write(tmp_path / "case.png", image[1:], reference, reference)
    assert list(tmp_path.iterdir()) == []


# --- metric plots --------------------------------------------------------------------------------------------------


def case_table(num_cases: int) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "fold": [str(number % 3) for number in range(num_cases)],
            "dice": rng.uniform(0.7, 0.95, num_cases),
            "hd95_mm": rng.gamma(3, 2, num_cases),
            "volume_difference_percent": rng.normal(0, 12, num_cases),
        }
    )


def test_metric_plot_has_a_panel_per_metric_and_a_group_per_fold(tmp_path: Path) -> None:
    figure = case_metrics_figure(case_table(10))
    assert [ax.get_title() for ax in figure.axes] == ["Dice", "HD95 (mm)", "volume difference (%)"]
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["0\nn=4", "1\nn=3", "2\nn=3"]
    draw_case_metrics(tmp_path / "cases.png", case_table(10))
    assert imread(tmp_path / "cases.png").std() > 0.05


def test_a_missed_gland_and_a_missing_value_are_within_the_plot(tmp_path: Path) -> None:
    table = case_table(9)
    table.loc[0, ["dice", "hd95_mm"]] = [0.0, 277.4]
    table.loc[0, "volume_difference_percent"] = np.nan
    figure = case_metrics_figure(table)
    low, high = figure.axes[1].get_ylim()
    assert low < 0.0 < 277.4 < high
    assert figure.axes[2].get_xticklabels()[0].get_text() == "0\nn=2"


def test_one_case_is_plotted(tmp_path: Path) -> None:
    draw_case_metrics(tmp_path / "cases.png", case_table(1))
    assert (tmp_path / "cases.png").exists()


def test_a_fold_whose_values_are_all_missing_is_plotted(tmp_path: Path) -> None:
    table = case_table(6)
    table.loc[table["fold"] == "1", "volume_difference_percent"] = np.nan
    draw_case_metrics(tmp_path / "cases.png", table)
    assert (tmp_path / "cases.png").exists()


def test_a_table_without_a_column_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the columns hd95_mm"):
        case_metrics_figure(case_table(3).drop(columns="hd95_mm"))


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="no row"):
        case_metrics_figure(case_table(0))
