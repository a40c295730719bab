"""One path from a study to its mask: the same in world space however the study is stored or turned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prostate_seg.config import ModelConfig
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.segmentation.inference import keep_largest_component, predict_probability, segment
from tests.imaging_helpers import DEFAULT, dice, real_study, rotate, rotation
from tests.segmentation_helpers import model_2d, model_3d, predictor


class Bright(nn.Module):
    """A network that finds what is brighter than the mean, in the middle slice of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 20 * x if x.ndim == 5 else 20 * x[:, x.shape[1] // 2, None]


class Always(nn.Module):
    """A network that returns one logit everywhere."""

    def __init__(self, logit: float):
        super().__init__()
        self.logit = logit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x[:, :1], self.logit)


class Left(nn.Module):
    """A network that finds the left half of whatever it sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(x[:, :1], -20.0)
        logits[..., : x.shape[-1] // 2] = 20.0
        return logits


def bright_mask(image: Volume) -> np.ndarray:
    ready = replace(predictor(Bright()), preprocess=replace(DEFAULT, spacing_mm=(3.0, 0.45, 0.45)))
    return segment(image, None, predictor=ready, threshold=0.5, largest_component=True).mask


@pytest.mark.parametrize("model", [model_2d(), model_2d(num_slices=3), model_3d(), model_3d(num_slices=16)])
@pytest.mark.parametrize("num_slices", [3, 9, 40])
def test_every_slice_gets_its_own_answer(model: ModelConfig, num_slices: int) -> None:
    image = torch.linspace(-1, 1, num_slices)[:, None, None].expand(num_slices, 8, 8)
    probability = predict_probability(image, predictor=predictor(Bright(), model=model))
    np.testing.assert_allclose(probability, torch.sigmoid(20 * image).numpy(), atol=1e-6)


def test_probabilities_of_an_ensemble_are_averaged() -> None:
    networks = Always(0.0), Always(np.log(3.0))  # probabilities 0.5 and 0.75
    probability = predict_probability(torch.zeros(4, 8, 8), predictor=predictor(*networks))
    np.testing.assert_allclose(probability, 0.625, rtol=1e-6)


def test_flips_average_the_mirror_image_back_in_place() -> None:
    image = torch.zeros(4, 8, 8)
    np.testing.assert_allclose(predict_probability(image, predictor=predictor(Left(), flips=True)), 0.5, atol=1e-6)
    symmetric = predict_probability(image + 1, predictor=predictor(Bright(), flips=True))
    np.testing.assert_allclose(symmetric, 1.0, atol=1e-6)


def test_largest_component_stays_and_empty_stays_empty() -> None:
    mask = np.zeros((5, 20, 20), dtype=bool)
    assert not keep_largest_component(mask).any()
    mask[1:4, 2:8, 2:8] = True
    big = mask.copy()
    mask[1, 15:18, 15:18] = True
    np.testing.assert_array_equal(keep_largest_component(mask), big)
    np.testing.assert_array_equal(keep_largest_component(big), big)


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "RAI", "ASR", "SLP"])
def test_flipped_or_reoriented_study_gives_the_same_mask_in_world_space(
    shared_data: Path, tmp_path: Path, orientation: str
) -> None:
    image, _ = real_study(shared_data, "11373_1001396")
    write_volume(tmp_path / "copy.mha", replace(image, stored_orientation=orientation))
    copy = read_volume(tmp_path / "copy.mha")
    assert copy.stored_orientation == orientation
    expected, found = bright_mask(image), bright_mask(copy)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(
        copy.geometry.to_world(np.argwhere(found)), image.geometry.to_world(np.argwhere(expected)), atol=1e-6
    )


def test_rigidly_rotated_study_gives_the_rotated_mask(shared_data: Path) -> None:
    image, _ = real_study(shared_data, "p158020_1")
    turned = replace(image, geometry=rotate(image.geometry, degrees=12))
    expected, found = bright_mask(image), bright_mask(turned)
    assert dice(found, expected) > 0.9999  # rounding of the turned grid may move a voxel at the threshold
    np.testing.assert_allclose(
        turned.geometry.to_world((3, 4, 5)), rotation(12) @ image.geometry.to_world((3, 4, 5)), atol=1e-9
    )


def test_mask_lies_on_the_studys_own_grid(shared_data: Path) -> None:
    image, _ = real_study(shared_data, "p158021_1")
    assert bright_mask(image).shape == image.array.shape
