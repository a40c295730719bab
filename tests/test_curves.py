"""Learning curves are drawn for one epoch as for many."""

from pathlib import Path

import matplotlib.image
import pytest

from prostate_seg.reporting.curves import draw_history


@pytest.mark.parametrize("num_epochs", [1, 3, 200])
def test_picture_is_written_whatever_the_number_of_epochs(tmp_path: Path, num_epochs: int) -> None:
    epochs = list(range(1, num_epochs + 1))
    dices = [epoch / (epoch + 3) for epoch in epochs]
    draw_history(
        tmp_path / "h.png",
        epochs=epochs,
        loss=[1 - d for d in dices],
        val_dice=dict(zip(epochs, dices, strict=True)),
        kept=num_epochs,
        title="Fold 0, é",
    )
    picture = matplotlib.image.imread(tmp_path / "h.png")
    assert picture.shape[1] > 500
    assert picture.std() > 0.05
