"""Rows of slices as small WebP pictures. Arrays are [Y, X]; a mask may have several labels."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from prostate_seg.reporting.figures.overlays import WINDOW_PERCENTILES

PANEL_INCH = 1.7
DPI = 120
WEBP_QUALITY = 70
LABEL_COLOURS = np.array(["#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442"])
"""Colours of the Okabe-Ito palette, by label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One slice with a title, and the contours of its labels."""

    title: str
    pixels: np.ndarray
    labels: np.ndarray | None = None
    aspect: float = 1.0
    """Height of a pixel over its width."""
    shift_vox: tuple[float, float] = (0.0, 0.0)
    """Position of the first pixel of the labels in the slice (y, x)."""
    limits: tuple[float, float] | None = None
    """Intensities drawn black and white; None takes percentiles of the slice."""
    square_vox: tuple[float, float, float, float] | None = None
    """Top, left, height and width of a window drawn on the slice."""


def write_panels(path: Path, panels: Sequence[Panel], *, num_columns: int = 4) -> None:
    """Write panels row by row; the file depends on the arguments alone."""
    heights = [panel.pixels.shape[0] * panel.aspect / panel.pixels.shape[1] for panel in panels]
    num_columns = min(num_columns, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    size_inch = (PANEL_INCH * num_columns, (PANEL_INCH * max(heights) + 0.25) * num_rows)
    figure = Figure(figsize=size_inch, dpi=DPI, layout="constrained")
    for number, panel in enumerate(panels):
        _draw(figure.add_subplot(num_rows, num_columns, number + 1, xticks=[], yticks=[]), panel)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    Image.open(buffer).convert("RGB").save(path, quality=WEBP_QUALITY, method=6)


def _draw(ax: Axes, panel: Panel) -> None:
    ax.set_title(panel.title, fontsize=9)
    finite = panel.pixels[np.isfinite(panel.pixels)]
    black, white = panel.limits or np.percentile(finite, WINDOW_PERCENTILES)
    grey = ax.imshow(panel.pixels, cmap="gray", vmin=black, vmax=max(white, black + 1e-6), aspect=panel.aspect)
    grey.cmap.set_bad("#D55E00")
    if panel.labels is not None:
        top, left = panel.shift_vox
        padded = np.pad(panel.labels, 1)
        y, x = (np.arange(-1, size + 1) + start for size, start in zip(panel.labels.shape, (top, left), strict=True))
        for number, label in enumerate(np.unique(padded[padded != 0])[: len(LABEL_COLOURS)]):
            ax.contour(x, y, padded == label, levels=[0.5], colors=[LABEL_COLOURS[number]], linewidths=1.4)
    if panel.square_vox is not None:
        top, left, height, width = panel.square_vox
        ax.plot(
            [left, left + width, left + width, left, left], [top, top, top + height, top + height, top], "y--", lw=1
        )
    ax.set_xlim(-0.5, panel.pixels.shape[1] - 0.5)
    ax.set_ylim(panel.pixels.shape[0] - 0.5, -0.5)
