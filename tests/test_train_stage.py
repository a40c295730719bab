"""Stage train refuses folds that it cannot train."""

from pathlib import Path
from typing import Any

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import workspace_of
from prostate_seg.data.folds import Fold
from prostate_seg.segmentation.training.history import Epoch, TrainingResult
from prostate_seg.stages import train
from tests.conftest import composed


@pytest.mark.parametrize("split", ["train", "val"])
def test_fold_without_train_or_val_studies_is_refused(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = {"train": ["a_1"], "val": ["b_1"], "test": []}
    folds = {0: Fold(**complete), 1: Fold(**{**complete, split: []})}
    monkeypatch.setattr(train, "checked_dataset", lambda *_: {})
    monkeypatch.setattr(train, "checked_folds", lambda *_: (folds, None))
    cfg = parse(composed(f"paths.root={tmp_path}"))
    with pytest.raises(InputError, match=f"fold 1: kfold.json lists no {split} studies\nRun stage=prepare again"):
        train.run(cfg, workspace_of(cfg))


def test_measured_precision_is_a_tag_of_the_run(tmp_path: Path) -> None:
    workspace = workspace_of(parse(composed(f"paths.root={tmp_path}")))
    epoch = Epoch(epoch=1, loss=1.0, val_dice=0.5, val_iou=0.4, learning_rate=0.1, batch_size=8, seconds=1.0)
    summaries: dict[int, dict[str, Any]] = {}
    for index, measured in enumerate([None, "bf16"]):
        workspace.fold(index).mkdir(parents=True)
        result = TrainingResult(history=[epoch], measured_precision=measured)
        summaries[index] = train._write_history(workspace.fold(index), result, metric="dice", title="")
    assert train._precision_tag({0: summaries[0]}) == {}
    assert train._precision_tag(summaries) == {"precision": "bf16"}
