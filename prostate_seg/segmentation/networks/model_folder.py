"""Trained networks as a folder that is all a prediction needs: fold0, fold1, ... as stage=train writes them.

stage=register adds segmentation.json, how the networks were used when they were evaluated. There is no code in the folder.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import md5_of, md5_of_text, read_json, write_json
from prostate_seg.common.settings import parse_group, plain, present_names
from prostate_seg.segmentation.inference.inference import Predictor
from prostate_seg.segmentation.inference.out_of_distribution import Ranges
from prostate_seg.segmentation.inference.settings import InferenceSettings
from prostate_seg.segmentation.networks.settings import Backend
from prostate_seg.segmentation.networks.storage import RECIPE, WEIGHTS, Recipe, load_network, load_recipe
from prostate_seg.segmentation.settings import Precision

USAGE = "segmentation.json"
ONNX = "network.onnx"
"""In the folder of a fold, where stage=register was asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(InferenceSettings):
    """How the networks of a folder are used."""

    precision: Precision
    """Number format of the forward pass."""

    @classmethod
    def of(cls, settings: InferenceSettings, *, precision: Precision) -> Self:
        """Return the usage of an evaluation."""
        values = {field.name: getattr(settings, field.name) for field in fields(InferenceSettings)}
        return cls(**values, precision=precision)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what `as_dict` wrote."""
        return parse_group(cls, present_names(values, key="evaluate"), key="evaluate")

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return cast(dict[str, Any], plain(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Networks that are ready to segment."""

    predictor: Predictor
    usage: Usage
    ranges: Ranges
    """What the studies were like that any of the networks was trained on."""
    notes: tuple[str, ...]
    """What every prediction must say of the model."""
    md5: str
    """Of weights, recipes, usage and backend: equal models give equal masks."""


def write_usage(folder: Path, usage: Usage) -> None:
    """Write segmentation.json."""
    write_json(folder / USAGE, usage.as_dict())


def read_usage(folder: Path) -> Usage | None:
    """Return how the networks of a folder were used when they were evaluated; None when nobody has written it down."""
    return Usage.from_dict(read_json(folder / USAGE)) if (folder / USAGE).is_file() else None


def network_folders(folder: Path, *, fold_index: int | None) -> list[Path]:
    """Return the folders of the networks, one of them where a fold is named, by number.

    Raises:
        InputError: If there is none, or not that one.
    """
    found = {int(path.name[4:]): path for path in folder.glob("fold*") if path.name[4:].isdigit() and path.is_dir()}
    if not found:
        raise InputError(
            f"{folder} holds no trained networks (fold0, fold1, ...): name the folder model/ that stage=train wrote, "
            "or a registered model such as models:/prostate_seg@champion"
        )
    if fold_index is None:
        return [found[index] for index in sorted(found)]
    if fold_index not in found:
        raise InputError(f"fold.index: {folder} has the folds {', '.join(map(str, sorted(found)))}, not {fold_index}")
    return [found[fold_index]]


def load_model(
    folder: Path,
    *,
    fold_index: int | None,
    usage: Usage,
    device: torch.device,
    backend: Backend = "torch",
) -> Model:
    """Load the networks of a folder as one ensemble.

    Args:
        folder: Holds fold0, fold1, ...
        fold_index: The one network to take; None takes all.
        usage: How to use them.
        device: Where they compute.
        backend: What computes them.

    Raises:
        InputError: If there are none, they do not belong together, or lack what the backend needs.
    """
    folders = network_folders(folder, fold_index=fold_index)
    recipes = [load_recipe(path) for path in folders]
    _require_one_kind(folders, recipes)
    first = recipes[0]
    used_oracle_crop = first.preprocess.crop == "mask"
    files = [path / name for path in folders for name in (RECIPE, WEIGHTS)]
    usage_text = str(usage.as_dict()).replace(
        "'tta'", "'flips'"
    )  # its former name: masks of earlier versions stay valid
    return Model(
        predictor=Predictor(
            networks=[
                _network(path, recipe, device=device, backend=backend)
                for path, recipe in zip(folders, recipes, strict=True)
            ],
            model=first.model,
            preprocess=replace(first.preprocess, crop="center"),
            zscore=first.zscore,
            device=device,
            precision=usage.precision,
            tta=usage.tta,
        ),
        usage=usage,
        ranges=_united([recipe.ranges for recipe in recipes]),
        notes=("trained on windows that the reference had placed (preprocess.crop=mask)",) if used_oracle_crop else (),
        md5=md5_of_text(" ".join([usage_text, backend, *map(md5_of, files)])),
    )


def _network(folder: Path, recipe: Recipe, *, device: torch.device, backend: Backend) -> nn.Module:
    if backend == "torch":
        return load_network(folder, recipe=recipe, device=device)
    if not (folder / ONNX).is_file():
        raise InputError(
            f"{folder} has no {ONNX}, which predict.backend=onnx runs: register the model with register.onnx=true, "
            "or take predict.backend=torch"
        )
    opened: nn.Module = importlib.import_module("prostate_seg.segmentation.networks.onnx_network").OnnxNetwork(
        folder / ONNX
    )
    return opened


def _require_one_kind(folders: Sequence[Path], recipes: Sequence[Recipe]) -> None:
    first = recipes[0]
    for path, recipe in zip(folders, recipes, strict=True):
        if (recipe.model, recipe.preprocess, recipe.zscore) != (first.model, first.preprocess, first.zscore):
            raise InputError(
                f"{path} and {folders[0]} were trained with other networks or preprocessing, and are no ensemble: "
                "train all folds with the same settings, or take one with fold.index"
            )


def _united(every: Sequence[Ranges]) -> dict[str, tuple[float, float]]:
    """Return the ranges that hold those of all networks; a number that one of them lacks says nothing."""
    names = [name for name in every[0] if all(name in ranges for ranges in every)]
    return {
        name: (min(ranges[name][0] for ranges in every), max(ranges[name][1] for ranges in every)) for name in names
    }
