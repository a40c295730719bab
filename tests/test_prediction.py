"""Prediction without a reference: volume, confidence, inter-model Dice, and every warning."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.geometry import Finding, Geometry, Volume
from prostate_seg.segmentation.inference.inference import inter_model_dice
from prostate_seg.segmentation.inference.out_of_distribution import out_of_distribution, property_ranges
from prostate_seg.segmentation.inference.prediction import Prediction, predict
from prostate_seg.segmentation.networks.model_folder import Model
from tests.segmentation_helpers import SETTINGS, predictor
from tests.test_inference import BrightVoxels, ConstantLogit, LeftHalf

GEOMETRY = Geometry(
    shape_vox=(20, 60, 60), spacing_mm=(3.0, 1.0, 1.0), origin_mm=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)
)
WIDE = replace(SETTINGS, spacing_mm=(3.0, 1.0, 1.0), image_size=64)


def study() -> Volume:
    """Return noise with a bright block of 10 x 30 x 30 voxels of 3 x 1 x 1 mm: 27 mL."""
    array = np.random.default_rng(0).normal(20, 1, size=GEOMETRY.shape_vox).clip(0, 100).astype(np.float32)
    array[5:15, 15:45, 15:45] += 60
    return Volume(array=array, geometry=GEOMETRY, stored_orientation="RAS")


def model(*networks: torch.nn.Module, ranges: dict[str, tuple[float, float]] | None = None) -> Model:
    return Model(name="m", predictor=predictor(*networks, preprocess=WIDE, ranges=ranges), notes=(), md5="m")


def found(*networks: torch.nn.Module, ranges: dict[str, tuple[float, float]] | None = None) -> Prediction:
    return predict(study(), model=model(*networks, ranges=ranges))


def test_a_clear_gland_has_its_volume_and_no_warning() -> None:
    one = found(BrightVoxels())
    assert one.mask.array.shape == GEOMETRY.shape_vox
    assert one.mask.stored_orientation == "RAS"
    assert one.volume_ml == pytest.approx(10 * 30 * 30 * 3 / 1000)
    assert one.num_slices == 10
    assert one.mean_confidence == pytest.approx(1.0, abs=1e-3)
    assert one.inter_model_dice is None
    assert one.warnings == []


def test_a_header_warning_is_a_warning_of_the_prediction() -> None:
    doubt = Finding(check="no_orientation", message="no orientation is stated")
    one = predict(replace(study(), warnings=(doubt,)), model=model(BrightVoxels()))
    assert one.warnings == ["image: no orientation is stated"]
    assert one.mask.warnings == ()


def test_low_inter_model_dice_is_a_warning() -> None:
    assert found(BrightVoxels(), BrightVoxels()).inter_model_dice == pytest.approx(1.0)
    apart = found(BrightVoxels(), LeftHalf())
    assert apart.inter_model_dice is not None
    assert apart.inter_model_dice < 0.85
    assert any(text.startswith("inter-model Dice 0.") for text in apart.warnings)


def test_no_gland_and_a_gland_that_fills_the_window_are_warnings() -> None:
    none = found(ConstantLogit(-5.0))
    assert none.warnings == ["no gland was found"]
    assert (none.volume_ml, none.num_slices, none.mean_confidence) == (0.0, 0, None)
    everywhere = " / ".join(found(ConstantLogit(0.5)).warnings)
    for words in (
        "first or last slice",
        "edge of the image or of the networks' window",
        "mean probability 0.62, below 0.8",
    ):
        assert words in everywhere


def test_an_out_of_distribution_study_has_a_warning_for_every_property() -> None:
    like = {"spacing_z_mm": (2.5, 3.6), "num_slices": (16.0, 24.0), "gland_volume_ml": (20.0, 90.0)}
    assert found(BrightVoxels(), ranges=like).warnings == []
    unlike = found(
        BrightVoxels(), ranges={"spacing_z_mm": (1.0, 1.5), "num_slices": (30.0, 40.0), "mean_grey": (0.9, 0.95)}
    )
    assert unlike.warnings[0] == "slice spacing 3.00 mm, in training 1 to 1.5"
    assert unlike.warnings[1] == "20 slices, in training 30 to 40"
    assert unlike.warnings[2].startswith("mean grey 0.")


def test_properties_a_quarter_outside_of_the_training_ranges_are_tolerated() -> None:
    ranges = property_ranges(
        [
            {"spacing_y_mm": 0.4, "spacing_z_mm": 3.0, "num_slices": 20, "mean_grey": 0.3, "gland_volume_ml": 40},
            {"spacing_y_mm": 0.5, "spacing_z_mm": 3.0, "num_slices": 20, "mean_grey": 0.4, "gland_volume_ml": 80},
        ]
    )
    assert ranges["gland_volume_ml"] == (40.0, 80.0)
    assert out_of_distribution({"gland_volume_ml": 99, "spacing_y_mm": 0.33, "mean_grey": 0.49}, ranges=ranges) == []
    assert (
        len(out_of_distribution({"gland_volume_ml": 101, "spacing_y_mm": 0.31, "mean_grey": 0.51}, ranges=ranges)) == 3
    )
    assert property_ranges([]) == {}


@pytest.mark.parametrize(
    ("array", "check"),
    [
        (np.zeros((20, 60, 60), dtype=np.float32), "constant_image"),
        (np.full((20, 60, 60), np.nan, dtype=np.float32), "nan"),
    ],
)
def test_an_unusable_image_is_refused_with_its_name(array: np.ndarray, check: str) -> None:
    with pytest.raises(VolumeError) as refusal:
        predict(Volume(array=array, geometry=GEOMETRY), model=model(BrightVoxels()))
    assert refusal.value.check == check


def test_inter_model_dice_is_the_mean_over_pairs() -> None:
    a, b, c = (np.zeros((1, 2, 4), dtype=bool) for _ in range(3))
    a[0, 0, :], b[0, 0, 2:], c[0, 1, :] = True, True, True
    assert inter_model_dice(np.stack([a, b])) == pytest.approx(2 * 2 / (4 + 2))
    assert inter_model_dice(np.stack([a, b, c])) == pytest.approx((4 / 6 + 0 + 0) / 3)
    assert inter_model_dice(np.stack([a])) is None
    assert inter_model_dice(np.zeros((2, 1, 2, 2), dtype=bool)) is None
