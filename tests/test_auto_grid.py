"""A grid chosen from the data set: every stage uses the numbers that stage=preprocess recorded."""

from pathlib import Path

import numpy as np
import pytest

from prostate_seg.common.files import read_json
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import write_volume
from prostate_seg.segmentation.networks.storage import load_recipe
from tests.stage_helpers import run_stages

AUTO = ["preprocess.spacing_mm=auto", "preprocess.image_size=auto"]
TINY = [
    "data=folder",
    "data.root=data",
    "fold.num_folds=2",
    "model.channels=[4,8]",
    "model.strides=[[2,2]]",
    "train.max_epochs=1",
    "train.steps_per_epoch=1",
    "evaluate.num_bootstrap=100",
    "mlflow=off",
]


def write_study(folder: Path, name: str, *, pixel_mm: float, off_centre_mm: float = 0.0, value: int) -> None:
    """Write a study of 100 mm with a block of 30 mm as gland, moved along y."""
    size = round(100 / pixel_mm)
    geometry = Geometry.from_xyz((size, size, 8), (pixel_mm, pixel_mm, 3.2), origin_mm=(0, 0, 0), direction=np.eye(3))
    noise = np.random.default_rng(value).normal(300, 30, geometry.shape_vox)
    first = round((35 + off_centre_mm) / pixel_mm)
    block = np.s_[2:6, first : first + round(30 / pixel_mm), round(35 / pixel_mm) : round(65 / pixel_mm)]
    gland = np.zeros(geometry.shape_vox, dtype=np.uint8)
    gland[block] = 1
    image = (noise + 400.0 * gland).astype(np.int16)
    write_volume(folder / "images" / f"{name}.nii.gz", Volume(array=image, geometry=geometry))
    write_volume(folder / "masks" / f"{name}.nii.gz", Volume(array=gland, geometry=geometry))


@pytest.fixture
def coarse_data(tmp_path: Path) -> Path:
    for index, pixel_mm in enumerate([1.17, 1.19, 1.21, 1.23]):
        write_study(tmp_path / "data", f"p{index}", pixel_mm=pixel_mm, value=index)
    return tmp_path


def test_all_stages_use_the_numbers_chosen_by_preprocessing(coarse_data: Path) -> None:
    result = run_stages(coarse_data, "stage=preprocess,prepare,train,evaluate", *TINY, *AUTO)
    assert result.returncode == 0, result.stderr
    # Medians 3.2 and 1.2 mm, rounded to 0.1 mm; 2 x (15 mm + 10 mm) / 1.2 mm = 42 voxels.
    assert "grid chosen from the data set: 3.2 x 1.2 x 1.2 mm, 48 x 48 voxels a slice" in result.stdout
    contract = read_json(coarse_data / "preprocess" / "contract.json")
    assert contract["auto"] == ["spacing_mm", "image_size"]
    assert contract["preprocess"]["spacing_mm"] == [3.2, 1.2, 1.2]
    recipe = load_recipe(coarse_data / "model" / "fold0")
    assert (recipe.preprocess.spacing_mm, recipe.preprocess.image_size) == ((3.2, 1.2, 1.2), 48)
    assert "the grid depends on test studies" not in result.stdout


def test_numbers_equal_to_the_chosen_ones_are_accepted_and_the_reverse_is_refused(coarse_data: Path) -> None:
    numbers = ["preprocess.spacing_mm=[3.2,1.2,1.2]", "preprocess.image_size=48"]
    assert run_stages(coarse_data, "stage=preprocess", *TINY, *AUTO).returncode == 0
    assert run_stages(coarse_data, "stage=prepare", *TINY, *numbers).returncode == 0
    assert run_stages(coarse_data, "stage=preprocess", *TINY, *numbers).returncode == 0
    result = run_stages(coarse_data, "stage=prepare", *TINY, *AUTO)
    assert result.returncode == 1
    assert "spacing_mm: is [3.2, 1.2, 1.2], wanted auto" in result.stderr


def test_stage_before_preprocessing_asks_for_it(coarse_data: Path) -> None:
    result = run_stages(coarse_data, "stage=prepare", *TINY, *AUTO)
    assert result.returncode == 1
    assert "run stage=preprocess first" in result.stderr


def test_fold_whose_training_studies_alone_give_another_grid_is_named(coarse_data: Path) -> None:
    write_study(coarse_data / "data", "p4", pixel_mm=1.22, off_centre_mm=15, value=4)
    result = run_stages(coarse_data, "stage=preprocess,prepare", *TINY, *AUTO)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "the grid depends on test studies" in line]
    assert len(lines) == 1  # the fold that tests p4
    assert "auto is 3.2 x 1.2 x 1.2 mm, 80 x 80 voxels a slice, and from the training studies alone" in lines[0]


def test_data_set_without_a_readable_gland_is_refused_with_the_next_step(coarse_data: Path) -> None:
    for path in (coarse_data / "data" / "masks").iterdir():
        path.write_bytes(b"")
    result = run_stages(coarse_data, "stage=preprocess", *TINY, *AUTO)
    assert result.returncode == 1
    assert "preprocess.spacing_mm=auto chooses the grid from the masks, and none of 4 has a gland" in result.stderr
    assert "stage=inspect lists the reasons" in result.stderr
