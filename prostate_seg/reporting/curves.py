"""Learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prostate_seg.common.files import atomic_path

MOST_MARKED = 40
"""Values up to which each gets a dot; more would merge into a thick line."""


def draw_history(
    path: Path, *, epochs: Sequence[int], loss: Sequence[float], val_dice: Mapping[int, float], kept: int, title: str
) -> None:
    """Draw training loss and val Dice by epoch as a PNG; a line marks the epoch `kept`."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    curves = ((left, dict(zip(epochs, loss, strict=True)), "training loss"), (right, val_dice, "val Dice"))
    for axes, values, label in curves:
        draw_curve(axes, values, colour="#0072B2")
        axes.axvline(kept, color="#D55E00", linewidth=1, linestyle="--")
        axes.set(xlabel="epoch", ylabel=label)
    right.set_title(f"{val_dice[kept]:.3f} in epoch {kept}, which is kept", fontsize=9)
    figure.suptitle(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})


def draw_curve(axes: Axes, values: Mapping[int, float], *, colour: str, label: str | None = None) -> None:
    """Draw one value per epoch as a line."""
    marker = "." if len(values) < MOST_MARKED else None
    axes.plot(list(values), list(values.values()), marker=marker, color=colour, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
