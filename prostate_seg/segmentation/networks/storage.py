"""A trained network on disk: weights.safetensors, which contains no code, and recipe.json with its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_path, read_json, write_json
from prostate_seg.common.settings import parse_group, plain
from prostate_seg.imaging.preprocessing import PreprocessSettings
from prostate_seg.segmentation.inference.out_of_distribution import TrainingRanges
from prostate_seg.segmentation.networks.networks import build_network
from prostate_seg.segmentation.networks.settings import ModelConfig

WEIGHTS, RECIPE = "weights.safetensors", "recipe.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Architecture, preprocessing and training cases of a network."""

    model: ModelConfig
    preprocess: PreprocessSettings
    zscore: bool
    train_ids: list[str]
    val_ids: list[str]
    ranges: TrainingRanges = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        own = plain(self)
        inputs = {name: own.pop(name) for name in ("model", "preprocess")}
        return {**inputs, "preprocess_hash": self.preprocess.digest, **own}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `as_dict` returned."""
        return cls(
            model=parse_group(ModelConfig, values["model"], key="model"),
            preprocess=parse_group(PreprocessSettings, {"zones": {}, **values["preprocess"]}, key="preprocess"),
            zscore=values["zscore"],
            train_ids=values["train_ids"],
            val_ids=values["val_ids"],
            ranges={name: (low, high) for name, (low, high) in values.get("ranges", {}).items()},
        )


def save_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the weights atomically."""
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file({name: value.contiguous() for name, value in weights.items()}, temporary)


def save_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe atomically."""
    write_json(folder / RECIPE, recipe.as_dict())


def load_recipe(folder: Path) -> Recipe:
    """Read the recipe of a trained network.

    Raises:
        InputError: If the folder has none.
    """
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder} has no trained network: run stage=train first")
    return Recipe.from_dict(read_json(folder / RECIPE))


def load_network(folder: Path, *, recipe: Recipe, device: torch.device) -> nn.Module:
    """Build the network of a recipe in eval mode, on `device`, and load its weights.

    Raises:
        InputError: If the weights are absent or damaged.
    """
    network = build_network(recipe.model, num_regions=len(recipe.preprocess.regions))
    try:
        network.load_state_dict(load_weights(folder))
    except RuntimeError as error:
        raise _not_loaded(folder, error) from error
    return network.to(device).eval()


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a network.

    Raises:
        InputError: If they are absent or damaged.
    """
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _not_loaded(folder, error) from error


def _not_loaded(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder / WEIGHTS} cannot be loaded: {error}\nRun stage=train again for this fold.")
