"""Every network maps its input to a logit per region and voxel; sizes that do not halve evenly are refused."""

import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.config import schema as config
from prostate_seg.segmentation.networks.networks import build_network, is_3d, require_legal_size
from prostate_seg.segmentation.networks.prelu import PReLU
from prostate_seg.segmentation.networks.settings import ModelName
from tests.conftest import composed
from tests.segmentation_helpers import model_2d, model_3d, small_model


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


@pytest.mark.parametrize("name", get_args(ModelName))
def test_every_parameter_has_a_gradient(name: ModelName) -> None:
    """A branch without influence on the output would never be trained."""
    model = small_model(name)
    network = build_network(model, num_regions=3)
    inputs = torch.randn((2, 1, 4, 32, 32) if is_3d(model) else (2, model.num_slices, 32, 32))
    logits = network(inputs)
    assert logits.shape == (2, 3, *inputs.shape[2:])
    logits.square().mean().backward()
    idle = [name for name, value in network.named_parameters() if value.grad is None]
    assert idle == []


@pytest.mark.parametrize("name", get_args(ModelName))
def test_2d_networks_keep_their_layout_when_weights_are_loaded(name: ModelName) -> None:
    model = small_model(name)
    torch.manual_seed(0)
    network, other = build_network(model), build_network(model)
    convolutions = [value for value in network.parameters() if value.ndim == 4]  # none in 3-D
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in convolutions)
    other.load_state_dict({name: value.contiguous() for name, value in network.state_dict().items()})
    assert [value.stride() for value in other.parameters()] == [value.stride() for value in network.parameters()]
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5])
def test_prelu_has_the_values_and_gradients_of_torch(slope: float) -> None:
    own, reference = PReLU(init=slope).double(), nn.PReLU(init=slope).double()
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    inputs = [features.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(one) for layer, one in zip((own, reference), inputs, strict=True)]
    for output in outputs:
        (output * features.cos()).sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(*(one.grad for one in inputs))
    torch.testing.assert_close(own.weight.grad, reference.weight.grad)


def test_networks_with_prelu_use_it_and_keep_its_parameter_under_autocast() -> None:
    network = build_network(model_2d())
    layers = [layer for layer in network.modules() if isinstance(layer, nn.PReLU)]
    assert {type(layer) for layer in layers} == {PReLU}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(torch.randn(2, 1, 32, 32)).float().square().mean().backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32 for layer in layers)


def test_dilations_widen_the_receptive_field() -> None:
    model = replace(small_model("resunet_a"), num_slices=1)
    reach = {}
    for dilation in (1, 7):
        torch.manual_seed(0)
        network = build_network(replace(model, dilations=[[dilation], [1]])).eval()
        image = torch.zeros(1, 1, 32, 32, requires_grad=True)
        network.stem(image)[0, :, 16, 16].sum().backward()  # type: ignore[operator]
        seen = image.grad[0, 0].abs().sum(0).nonzero()  # type: ignore[index]
        reach[dilation] = int(seen.max() - seen.min())
    assert reach == {1: 4, 7: 28}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("attention_unet", {"norm": "instance"}, "norm: must be batch for model.name=attention_unet"),
        ("attention_unet", {"num_res_units": 1}, "num_res_units: must be 0"),
        ("resunet_a", {"dilations": None}, "dilations: must be a list of numbers above 0"),
        ("resunet_a", {"dilations": [[1]]}, "dilations: must be a list of numbers above 0"),
        ("resunet_a", {"dilations": [[1], []]}, "dilations: must be a list of numbers above 0"),
        ("unet", {"dilations": [[1], [1]]}, "dilations: must be null for model.name=unet"),
        ("dynunet", {"num_res_units": 2}, "num_res_units: must be 0 or 1"),
        ("dynunet", {"channels": [4, 8], "strides": [[2, 2]]}, "channels: must be three or more numbers"),
        ("segresnet", {"num_res_units": 0}, "num_res_units: must be at least 1"),
        ("segresnet", {"channels": [8, 24]}, "channels: must double"),
        ("segresnet", {"strides": [[4, 4]]}, "strides: must all be 2"),
        ("segresnet", {"channels": []}, "channels: must be two or more"),
    ],
)
def test_setting_that_a_network_does_not_support_is_refused(name: ModelName, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(small_model(name), **changes)


@pytest.mark.parametrize("option", get_args(ModelName))
def test_model_options_accept_the_default_image_size(option: str) -> None:
    cfg = config.parse(composed(f"model={option}"))
    require_legal_size(cfg.model, image_size=cfg.preprocess.image_size)


def test_size_that_does_not_halve_is_refused_with_the_next_legal_sizes() -> None:
    cfg = config.parse(composed())
    with pytest.raises(InputError, match=r"preprocess.image_size: must be a multiple of 16 .* is 150; use 144 or 160"):
        require_legal_size(cfg.model, image_size=150)
    with pytest.raises(InputError, match=r"num_slices: must be a multiple of 2 .* is 5; use 4 or 6"):
        require_legal_size(model_3d(num_slices=5), image_size=32)
    with pytest.raises(
        InputError, match=r"preprocess.image_size: must be a multiple of 16 from 32 on .* is 16; use 32"
    ):
        require_legal_size(cfg.model, image_size=16)
