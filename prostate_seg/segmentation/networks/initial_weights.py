"""Initial weights of a network from a trained one: what must agree, what is copied, and what stays frozen."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prostate_seg.common.errors import InputError
from prostate_seg.common.settings import flat, plain
from prostate_seg.segmentation.networks.networks import encoder_parameters
from prostate_seg.segmentation.networks.settings import ModelName
from prostate_seg.segmentation.networks.storage import Recipe
from prostate_seg.segmentation.training.settings import Frozen

WITHOUT_WEIGHTS = ("num_slices", "dropout")
"""Settings of `model` that may differ: another number of slices changes the shape of the first convolution alone."""
MAX_SPACING_RATIO = 2.0
"""Largest ratio of two voxel edges at which weights are still useful: structures change their size by it."""


def input_differences(there: Recipe, here: Recipe, *, source: str) -> list[str]:
    """Return a line for each setting by which the inputs of two networks differ: preprocessing and train.zscore.

    Raises:
        InputError: If architectures differ, or voxel edges by more than `MAX_SPACING_RATIO`.
    """
    if differences := _differences(plain(there.model), plain(here.model), key="model", ignored=WITHOUT_WEIGHTS):
        raise InputError(
            f"train.init: the network must be that of {source}, and differs:\n  "
            + "\n  ".join(differences)
            + "\nUse the settings of that network, or train.init=null."
        )
    spacings = [recipe.preprocess.spacing_mm for recipe in (there, here)]
    if spacings[0] and spacings[1]:
        ratio = max(max(a / b, b / a) for a, b in zip(*spacings, strict=True))
        if ratio > MAX_SPACING_RATIO:
            raise InputError(
                f"train.init: voxel edges must be those of {source} within a factor of {MAX_SPACING_RATIO:g}, and differ by "
                f"{ratio:.3g}: there {list(spacings[0])} mm, here {list(spacings[1])} mm\n"
                "Preprocess with preprocess.spacing_mm as there, or train.init=null."
            )
    lines = _differences(there.preprocess.as_dict(), here.preprocess.as_dict(), key="preprocess")
    return lines + _differences({"zscore": there.zscore}, {"zscore": here.zscore}, key="train")


def _differences(
    there: Mapping[str, Any], here: Mapping[str, Any], *, key: str, ignored: tuple[str, ...] = ()
) -> list[str]:
    """Return a line for each setting that differs, with both values."""
    both = [flat({key: {name: value for name, value in one.items() if name not in ignored}}) for one in (there, here)]
    names = sorted(both[0].keys() | both[1].keys())
    values = {name: [one.get(name, "absent") for one in both] for name in names}
    return [f"{name}: there {a}, here {b}" for name, (a, b) in values.items() if a != b]


def start_from(
    network: nn.Module, weights: Mapping[str, torch.Tensor], *, name: ModelName, freeze: Frozen | None
) -> list[str]:
    """Copy all weights that fit by name and shape into a network, freeze a part of it, and return lines for the log.

    Raises:
        InputError: If a parameter of an encoder to freeze does not fit: it has random weights.
    """
    own = network.state_dict()
    fitting = {
        name: weights[name] for name, value in own.items() if name in weights and weights[name].shape == value.shape
    }
    network.load_state_dict(own | fitting)
    fresh = sorted(own.keys() - fitting)
    lines = [f"{len(fresh)} tensors do not fit and are initialised anew: {', '.join(fresh)}"] if fresh else []
    if freeze == "encoder":
        encoder = encoder_parameters(network, name=name)
        if random := sorted(encoder.keys() & set(fresh)):
            raise InputError(
                f"train.freeze=encoder: the whole encoder must come from train.init, and {', '.join(random)} does not fit\n"
                "Use model.num_slices as there, or train.freeze=null."
            )
        for parameter in encoder.values():
            parameter.requires_grad_(False)
        num_all = sum(parameter.numel() for parameter in network.parameters())
        num_trained = num_all - sum(parameter.numel() for parameter in encoder.values())
        lines.append(f"train.freeze=encoder: {num_trained:,} of {num_all:,} parameters are trained")
    return lines
