"""A folder of networks is loaded as an ensemble with the inference settings of its evaluation; others are refused."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import write_json
from prostate_seg.common.settings import plain
from prostate_seg.imaging.preprocessing import PreprocessSettings
from prostate_seg.segmentation.inference.inference import predict_probability
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.model_folder import Model, load_model, read_usage
from prostate_seg.segmentation.networks.networks import build_network
from prostate_seg.segmentation.networks.storage import save_recipe, save_weights
from tests.segmentation_helpers import SETTINGS, SIZE, model_2d, recipe
from tests.test_expected_dice import fitted, simulated

USAGE = Usage(threshold=0.5, largest_component=True, tta=False, precision="fp32")
CPU = torch.device("cpu")


def save_fold(
    folder: Path,
    number: int,
    *,
    preprocess: PreprocessSettings = SETTINGS,
    ranges: dict[str, tuple[float, float]] | None = None,
) -> None:
    """Write a network with distinct weights."""
    torch.manual_seed(number)
    path = folder / f"fold{number}"
    path.mkdir(parents=True)
    save_weights(path, build_network(model_2d()).state_dict())
    save_recipe(path, recipe(preprocess=preprocess, ranges=ranges))


def load(folder: Path, *, fold_index: int | None = None, usage: Usage = USAGE) -> Model:
    return load_model(folder, fold_index=fold_index, usage=usage, device=CPU)


def test_all_folds_are_one_ensemble_and_a_single_fold_can_be_loaded(tmp_path: Path) -> None:
    for number in (0, 1, 10):
        save_fold(tmp_path, number)
    image = torch.randn(5, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    alone = [predict_probability(image, predictor=load(tmp_path, fold_index=n).predictor) for n in (0, 1, 10)]
    together = predict_probability(image, predictor=load(tmp_path).predictor)
    np.testing.assert_allclose(together, np.mean(alone, axis=0), atol=1e-6)


def test_usage_round_trip(tmp_path: Path) -> None:
    assert read_usage(tmp_path) is None
    usage = Usage(threshold=0.4, largest_component=False, tta=True, precision="auto")
    write_json(tmp_path / "segmentation.json", plain(usage))
    assert read_usage(tmp_path) == usage


def test_equal_models_have_equal_md5_and_different_models_do_not(tmp_path: Path) -> None:
    save_fold(tmp_path, 0)
    save_fold(tmp_path, 1)
    whole = load(tmp_path).md5
    assert load(tmp_path).md5 == whole
    assert load(tmp_path, fold_index=0).md5 != whole
    assert load(tmp_path, usage=replace(USAGE, threshold=0.4)).md5 != whole


def test_training_ranges_of_an_ensemble_include_those_of_its_networks(tmp_path: Path) -> None:
    save_fold(tmp_path, 0, ranges={"spacing_z_mm": (3.0, 3.0), "num_slices": (19, 21)})
    save_fold(tmp_path, 1, ranges={"spacing_z_mm": (2.5, 3.6)})
    assert load(tmp_path).predictor.recipe.ranges == {"spacing_z_mm": (2.5, 3.6)}


def test_networks_trained_on_an_oracle_crop_use_the_centre_with_a_warning(tmp_path: Path) -> None:
    save_fold(tmp_path, 0, preprocess=replace(SETTINGS, crop="mask"))
    model = load(tmp_path)
    assert model.predictor.recipe.preprocess.crop == "center"
    assert "preprocess.crop=mask" in model.notes[0]


def test_folders_without_an_ensemble_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no trained networks"):
        load(tmp_path)
    save_fold(tmp_path, 0)
    with pytest.raises(InputError, match=r"fold.index: .* has the folds 0, not 3"):
        load(tmp_path, fold_index=3)
    save_fold(tmp_path, 1, preprocess=replace(SETTINGS, image_size=64))
    with pytest.raises(InputError, match="trained with other networks or preprocessing"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"has no network.onnx.*register.onnx=true"):
        load_model(tmp_path, fold_index=0, usage=USAGE, device=CPU, backend="onnx")


def test_a_calibration_on_the_ensemble_is_not_used_for_one_of_its_networks(tmp_path: Path) -> None:
    for number in (0, 1):
        save_fold(tmp_path, number)
    rows, dice = simulated(20, rng=np.random.default_rng(0))
    calibration = fitted([{**row, "inter_model": row["tta"]} for row in rows], dice)
    write_json(tmp_path / "trust.json", {"expected_dice": asdict(calibration), "temperature": {}})
    assert load(tmp_path).expected_dice == calibration
    alone = load(tmp_path, fold_index=0)
    assert alone.expected_dice is None
    assert alone.no_expected_dice == "it is calibrated on the ensemble, and fold.index chooses one network"
    assert load(tmp_path).md5 != alone.md5
