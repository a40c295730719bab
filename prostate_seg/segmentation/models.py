"""The networks, by name, from MONAI.

A 2-D network takes [B, num_slices, Y, X] and a 3-D network [B, 1, Z, Y, X]; both return one logit per voxel of the gland,
[B, 1, Y, X] or [B, 1, Z, Y, X].
"""

from collections.abc import Callable

import numpy as np
from monai.networks.nets.attentionunet import AttentionUnet
from monai.networks.nets.unet import UNet
from torch import nn

from prostate_seg.config import ModelConfig, ModelName
from prostate_seg.errors import InputError


def is_3d(settings: ModelConfig) -> bool:
    """Return whether the network works on volumes."""
    return len(settings.strides[0]) == 3


def build_network(settings: ModelConfig) -> nn.Module:
    """Return a new network with random weights."""
    return NETWORKS[settings.name](settings)


def require_legal_size(settings: ModelConfig, *, image_size: int) -> None:
    """Check that every level of the network halves evenly.

    Raises:
        InputError: If the input size is not a multiple of the product of the strides; names the next legal sizes.
    """
    factors = np.prod(np.array(settings.strides), axis=0)
    sizes = {"preprocess.image_size": (image_size, int(factors[-1]))}
    if is_3d(settings):
        sizes["model.num_slices"] = (settings.num_slices, int(factors[0]))
    for key, (size, factor) in sizes.items():
        if size % factor:
            below, above = size // factor * factor, (size // factor + 1) * factor
            legal = f"{below} or {above}" if below else f"{above}"
            raise InputError(
                f"{key}: must be a multiple of {factor} for model={settings.name.value}, is {size}; use {legal}"
            )


def _unet(settings: ModelConfig) -> nn.Module:
    """MONAI's U-Net with residual units (Kerfoot et al. 2018)."""
    return UNet(
        spatial_dims=3 if is_3d(settings) else 2,
        in_channels=1 if is_3d(settings) else settings.num_slices,
        out_channels=1,
        channels=settings.channels,
        strides=[tuple(level) for level in settings.strides],
        num_res_units=settings.num_res_units,
        act=settings.activation.value,
        norm=settings.norm.value,
        dropout=settings.dropout,
    )


def _attention_unet(settings: ModelConfig) -> nn.Module:
    """MONAI's attention U-Net (Oktay et al. 2018); its blocks are batch-normalised, with ReLU."""
    return AttentionUnet(
        spatial_dims=3 if is_3d(settings) else 2,
        in_channels=1 if is_3d(settings) else settings.num_slices,
        out_channels=1,
        channels=settings.channels,
        strides=[tuple(level) for level in settings.strides],
        dropout=settings.dropout,
    )


NETWORKS: dict[ModelName, Callable[[ModelConfig], nn.Module]] = {
    ModelName.unet: _unet,
    ModelName.attention_unet: _attention_unet,
    ModelName.unet3d: _unet,
}
"""Builder of each network."""
