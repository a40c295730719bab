"""Every network of the table maps its input to one logit per voxel; sizes that do not halve evenly are refused."""

import pytest
import torch

from prostate_seg import config
from prostate_seg.config import ModelName
from prostate_seg.errors import InputError
from prostate_seg.segmentation.models import NETWORKS, build_network, require_legal_size
from tests.conftest import composed
from tests.segmentation_helpers import model_2d, model_3d


def test_table_has_every_name() -> None:
    assert set(NETWORKS) == set(ModelName)


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (model_2d(), (2, 1, 32, 32), (2, 1, 32, 32)),
        (model_2d(num_slices=3), (2, 3, 32, 32), (2, 1, 32, 32)),
        (model_3d(), (2, 1, 4, 32, 32), (2, 1, 4, 32, 32)),
    ],
    ids=["2-D", "2.5-D", "3-D"],
)
def test_logits_have_the_shape_of_the_mask(model: config.ModelConfig, shape: tuple, expected: tuple) -> None:
    assert build_network(model)(torch.zeros(shape)).shape == expected


@pytest.mark.parametrize("option", ["unet", "attention_unet", "unet3d"])
def test_shipped_options_take_the_shipped_size(option: str) -> None:
    cfg = config.parse(composed(f"model={option}"))
    require_legal_size(cfg.model, image_size=cfg.preprocess.image_size)


def test_size_that_does_not_halve_is_refused_with_the_next_legal_sizes() -> None:
    cfg = config.parse(composed())
    with pytest.raises(InputError, match=r"preprocess.image_size: must be a multiple of 16 .* is 150; use 144 or 160"):
        require_legal_size(cfg.model, image_size=150)
    with pytest.raises(InputError, match=r"model.num_slices: must be a multiple of 2 .* is 5; use 4 or 6"):
        require_legal_size(model_3d(num_slices=5), image_size=32)
