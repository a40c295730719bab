"""Training from given weights: what fits is copied, what differs is reported, and a frozen encoder does not change by a bit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from prostate_seg.common.errors import ConfigError, InputError
from prostate_seg.config.schema import parse
from prostate_seg.segmentation.networks.initial_weights import (
    input_differences,
    start_from,
)
from prostate_seg.segmentation.networks.networks import build_network, encoder_parameters
from prostate_seg.segmentation.networks.settings import ModelConfig, ModelName
from prostate_seg.segmentation.networks.storage import Recipe
from prostate_seg.segmentation.training.checkpoints import Checkpoints
from prostate_seg.segmentation.training.distributed import ProcessGroup
from prostate_seg.segmentation.training.history import Epoch, TrainingResult
from prostate_seg.stages.train import fit_fold, training_identity
from tests.conftest import composed
from tests.segmentation_helpers import SETTINGS, model_2d, packed_discs, small_model, train_settings

RECIPE = Recipe(model=model_2d(), preprocess=SETTINGS, zscore=False, train_ids=["a", "b", "c"], val_ids=["d"])
FROZEN = train_settings(init="x", freeze="encoder", max_epochs=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    packed_discs(tmp_path / "packed", [*RECIPE.train_ids, *RECIPE.val_ids])
    return tmp_path / "packed"


def trained_weights(model: ModelConfig, *, seed: int = 5) -> dict[str, torch.Tensor]:
    """Return weights of a network with running statistics that are not those of a new one."""
    torch.manual_seed(seed)
    weights = build_network(model).state_dict()
    return {name: value + 0.01 if "running" in name else value for name, value in weights.items()}


def fitted(data: Path, recipe: Recipe, initial: Mapping[str, torch.Tensor] | None, **changes: object) -> TrainingResult:
    settings = replace(FROZEN, **changes.pop("settings", {}))  # type: ignore[arg-type]
    cfg = replace(parse(composed("seed=0", "machine.device=cpu")), train=settings)
    return fit_fold(cfg, recipe, data, fold_index=0, group=ProcessGroup(), initial=initial, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", get_args(ModelName))
def test_frozen_encoder_keeps_weights_and_running_statistics_to_the_bit(data: Path, name: ModelName) -> None:
    model = small_model(name)
    initial = trained_weights(model)
    weights = fitted(data, replace(RECIPE, model=model), initial).weights
    encoder = set(encoder_parameters(build_network(model), name=name))
    layers = {key.rpartition(".")[0] for key in encoder}
    frozen = {key for key in initial if key.rpartition(".")[0] in layers}
    assert {key for key in frozen if not torch.equal(weights[key], initial[key])} == set()
    aliases = {key for key in initial if key.startswith("skip_layers.")}  # of DynUNet, second names of the same layers
    trained = {key for key in initial if key not in frozen | aliases and initial[key].is_floating_point()}
    changed = {key for key in trained if not torch.equal(weights[key], initial[key])}
    assert changed == trained


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        (
            "unet",
            ["model.0.", "model.1.submodule.0.", "model.1.submodule.1.submodule."],
            ["model.2.", "model.1.submodule.2."],
        ),
        (
            "attention_unet",
            ["model.0.", "model.1.submodule.0.", "model.1.submodule.1.submodule."],
            ["model.2.", "model.1.attention.", "model.1.submodule.1.upconv.", "model.1.submodule.1.merge."],
        ),
        ("resunet_a", ["stem.", "down.1.", "middle.join."], ["up.1.", "join.1.", "end.0.join."]),
        ("dynunet", ["input_block.", "downsamples.0.", "bottleneck."], ["upsamples.0.", "output_block."]),
        ("segresnet", ["convInit.", "down_layers.2."], ["up_layers.0.", "up_samples.1.", "conv_final."]),
    ],
)
def test_encoder_reaches_down_to_the_coarsest_level(name: ModelName, inside: list[str], outside: list[str]) -> None:
    small = small_model(name)
    channels = [8, 16, 32] if name == "segresnet" else [4, 8, 8]
    dilations = [[1], [1], [1]] if small.dilations else None
    network = build_network(replace(small, channels=channels, strides=[[2, 2]] * 2, dilations=dilations))
    encoder = set(encoder_parameters(network, name=name))
    everything = {key for key, _ in network.named_parameters()}
    for start in inside:
        part = {key for key in everything if key.startswith(start)}
        assert part
        assert part <= encoder, start
    for start in outside:
        part = {key for key in everything if key.startswith(start)}
        assert part
        assert not part & encoder, start


def test_training_of_a_frozen_encoder_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, model=small_model("attention_unet"))
    initial, checkpoints = trained_weights(recipe.model), Checkpoints(folder=tmp_path / "checkpoints", identity="x")
    whole = fitted(data, recipe, initial).weights

    def stop(_: Epoch) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fitted(data, recipe, initial, checkpoints=checkpoints, on_epoch_end=stop)
    resumed = fitted(data, recipe, initial, checkpoints=checkpoints)
    assert len(resumed.history) == 2
    assert all(torch.equal(resumed.weights[name], value) for name, value in whole.items())


def test_training_starts_from_the_given_weights(data: Path) -> None:
    settings = {"freeze": None, "learning_rate": 1e-12, "ema_decay": 0.0, "max_epochs": 1}
    initial = trained_weights(RECIPE.model)
    weights = fitted(data, RECIPE, initial, settings=settings).weights
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in initial.items())


OUTPUT = [f"model.2.{layer}.{value}" for layer in ("0.conv", "1.conv.unit0.conv") for value in ("bias", "weight")]


@pytest.mark.parametrize(
    ("num_slices", "num_regions", "fresh"),
    [
        (1, 1, []),
        (3, 1, ["model.0.conv.unit0.conv.weight", "model.0.residual.weight"]),
        (1, 3, OUTPUT),
    ],
)
def test_other_numbers_of_slices_or_regions_keep_all_that_fits(
    num_slices: int, num_regions: int, fresh: list[str]
) -> None:
    weights = trained_weights(model_2d())
    network = build_network(model_2d(num_slices=num_slices), num_regions=num_regions)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    lines = start_from(network, weights, name="unet", freeze=None)
    assert ", ".join(fresh) == "".join(lines).partition("anew: ")[2]
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name] if name in fresh else weights[name]), name


def test_what_does_not_fit_and_what_is_trained_is_logged() -> None:
    lines = start_from(
        build_network(model_2d(), num_regions=3), trained_weights(model_2d()), name="unet", freeze="encoder"
    )
    assert lines[0].startswith(
        "4 tensors do not fit and are initialised anew: model.2.0.conv.bias, model.2.0.conv.weight"
    )
    assert lines[1] == "train.freeze=encoder: 412 of 830 parameters are trained"


def test_encoder_with_random_weights_is_not_frozen() -> None:
    network = build_network(model_2d(num_slices=3))
    with pytest.raises(
        InputError, match=r"must come from train.init, and model.0.conv.unit0.conv.weight, .* does not fit"
    ):
        start_from(network, trained_weights(model_2d()), name="unet", freeze="encoder")


def test_other_architecture_is_refused_setting_by_setting() -> None:
    other = replace(RECIPE, model=replace(model_2d(num_slices=3), channels=[8, 16], norm="batch", dropout=0.1))
    with pytest.raises(InputError) as caught:
        input_differences(RECIPE, other, source="gland version 3")
    assert str(caught.value).splitlines() == [
        "train.init: the network must be that of gland version 3, and differs:",
        "  model.channels: there [4, 8], here [8, 16]",
        "  model.norm: there instance, here batch",
        "Use the settings of that network, or train.init=null.",
    ]
    similar = replace(RECIPE, model=replace(model_2d(num_slices=5), dropout=0.3))
    assert input_differences(RECIPE, similar, source="x") == []


def test_other_inputs_are_reported_and_another_scale_is_refused() -> None:
    assert input_differences(RECIPE, RECIPE, source="x") == []
    other = replace(RECIPE, preprocess=replace(SETTINGS, spacing_mm=(3.0, 0.8, 0.8), image_size=64), zscore=True)
    assert input_differences(RECIPE, other, source="x") == [
        "preprocess.image_size: there 32, here 64",
        "preprocess.spacing_mm: there [3.0, 0.5, 0.5], here [3.0, 0.8, 0.8]",
        "train.zscore: there false, here true",
    ]
    coarse = replace(RECIPE, preprocess=replace(SETTINGS, spacing_mm=(3.0, 1.01, 1.01)))
    with pytest.raises(InputError, match=r"within a factor of 2, and differ by 2.02: there \[3.0, 0.5, 0.5\] mm"):
        input_differences(RECIPE, coarse, source="x")
    own_grid = replace(RECIPE, preprocess=replace(SETTINGS, spacing_mm=None))
    assert input_differences(RECIPE, own_grid, source="x") == [
        "preprocess.spacing_mm: there [3.0, 0.5, 0.5], here null"
    ]


def test_identity_of_a_training_depends_on_the_content_of_its_initial_weights() -> None:
    def identity(initial_md5: str | None, *overrides: str) -> str:
        return training_identity(parse(composed(*overrides)), RECIPE, data="x", initial_md5=initial_md5)

    random = identity(None)
    champion, frozen = "train.init=models:/gland@champion", "train.freeze=encoder"
    of_a, of_b = identity("a", champion), identity("b", champion)
    assert len({random, of_a, of_b, identity("a", champion, frozen)}) == 4
    assert identity("a", "train.init=folder") == of_a  # the same weights under another name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.freeze=encoder",
            "train.freeze: must be null without train.init: random weights are trained, is encoder",
        ),
        ("train.init=' '", "train.init: must be null, models:/NAME@ALIAS"),
    ],
)
def test_impossible_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(composed(override))
