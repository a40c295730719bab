"""Learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prostate_seg.files import atomic_path


def draw_history(
    path: Path, *, epochs: Sequence[int], loss: Sequence[float], val_dice: Mapping[int, float], kept: int, title: str
) -> None:
    """Draw training loss and val Dice by epoch as a PNG; a line marks the epoch `kept`."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    curves = ((left, dict(zip(epochs, loss, strict=True)), "training loss"), (right, val_dice, "val Dice"))
    for axes, values, label in curves:
        axes.plot(list(values), list(values.values()), marker="." if len(values) < 40 else None, color="#0072B2")
        axes.axvline(kept, color="#D55E00", linewidth=1, linestyle="--")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
    right.set_title(f"{val_dice[kept]:.3f} in epoch {kept}, which is kept", fontsize=9)
    figure.suptitle(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
