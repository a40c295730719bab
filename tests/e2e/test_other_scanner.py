"""Transfer between two simulated scanners, whose contrast, bias field and spacing differ."""

import json
from pathlib import Path

import pytest

from prostate_seg.common.files import read_json
from tests.project_helpers import only_in_hard_use
from tests.stage_helpers import run_stages

pytestmark = [pytest.mark.slow, only_in_hard_use]

NETWORK = ["model.channels=[8,16,32,64]", "model.strides=[[2,2],[2,2],[2,2]]", "train.precision=fp32"]
WINDOW = ["preprocess.spacing_mm=[3,1,1]", "preprocess.image_size=80", "mlflow=off", "evaluate.num_bootstrap=100"]
SMALL_GLANDS = ["data.phantom.field_of_view_mm=100", "data.phantom.gland_volume_range_ml=[25,50]"]
COMMON = [*NETWORK, *WINDOW, *SMALL_GLANDS, "data.phantom.num_second_studies=0", "train.steps_per_epoch=50"]
SITE_A = ["data.phantom.num_patients=16", "data.phantom.scanners=[standard]", "data.phantom.difficulty=0.3", "seed=1"]
SITE_B = ["data.phantom.num_patients=24", "data.phantom.scanners=[coarse]", "data.phantom.difficulty=0.8", "seed=2"]
EPOCHS = "train.max_epochs=12"
"""600 steps for every training."""


def run(folder: Path, *arguments: str) -> None:
    folder.mkdir(exist_ok=True)
    done = run_stages(folder, *arguments, *COMMON)
    assert done.returncode == 0, done.stderr


def use_sixteen_and_four_cases(folder: Path) -> None:
    """Let fold 0 have 16 of the 24 cases for training and val, and fold 1 four of these; both have the same 8 test cases."""
    ids = [f"ph{number:03d}_1" for number in range(1, 25)]
    known, test = ids[:16], ids[16:]
    folds = [
        {"train": known[:13], "val": known[13:], "test": test},
        {"train": known[:3], "val": known[13:14], "test": test},
    ]
    file = folder / "prepared/kfold.json"
    file.write_text(json.dumps({**read_json(file), "folds": folds}))


def test_four_cases_and_the_weights_of_another_scanner_reach_the_dice_of_sixteen_cases(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    run(a, "stage=fetch,preprocess,prepare,train", "fold=all", EPOCHS, *SITE_A)
    run(b, "stage=fetch,preprocess,prepare", "fold.num_folds=3", *SITE_B)
    use_sixteen_and_four_cases(b)
    start = [f"train.init={a / 'model'}", "train.learning_rate=1e-3"]
    trainings = {
        "16 cases": ["fold.index=0", EPOCHS],
        "4 cases": ["fold.index=1", EPOCHS],
        "4 cases and A": ["fold.index=1", EPOCHS, *start],
        "A alone": ["fold.index=1", "train.max_epochs=1", "train.learning_rate=1e-9", start[0]],
    }
    dice = {}
    for name, settings in trainings.items():
        run(b, "stage=train,evaluate", *SITE_B, *settings)
        dice[name] = read_json(b / "evaluation/summary.json")["test"]["dice"]
    assert dice["4 cases and A"] >= dice["16 cases"], dice
    assert dice["4 cases and A"] > max(dice["4 cases"], dice["A alone"]), dice
