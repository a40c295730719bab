"""The networks, by name, from MONAI or from its blocks.

A 2-D network takes [B, num_slices, Y, X] and a 3-D network [B, 1, Z, Y, X]; both return one logit per voxel of the gland,
[B, 1, Y, X] or [B, 1, Z, Y, X].
"""

from collections.abc import Callable

import numpy as np
from monai.networks.nets.attentionunet import AttentionUnet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet
from torch import nn

from prostate_seg.common.errors import InputError
from prostate_seg.segmentation.networks.resunet_a import ResUNetA
from prostate_seg.segmentation.networks.settings import ModelConfig, ModelName

SMALLEST_COARSE_EDGE = 2
"""Voxels of the coarsest level: normalisation of a single voxel has nothing to measure."""


def is_3d(settings: ModelConfig) -> bool:
    """Return whether the network works on volumes."""
    return len(settings.strides[0]) == 3


def build_network(settings: ModelConfig) -> nn.Module:
    """Return a new network with random weights."""
    return NETWORKS[settings.name](settings)


def require_legal_size(settings: ModelConfig, *, image_size: int) -> None:
    """Check that every level of the network halves evenly.

    Raises:
        InputError: If the input size is not a multiple of the product of the strides, or no more than that; names the next
            legal sizes.
    """
    factors = np.prod(np.array(settings.strides), axis=0)
    sizes = {"preprocess.image_size": (image_size, int(factors[-1]), SMALLEST_COARSE_EDGE)}
    if is_3d(settings):
        sizes["model.num_slices"] = (settings.num_slices, int(factors[0]), 1)
    for key, (size, factor, fewest) in sizes.items():
        if size % factor or size < fewest * factor:
            below, above = size // factor * factor, (size // factor + 1) * factor
            legal = f"{below} or {above}" if below >= fewest * factor else f"{max(above, fewest * factor)}"
            rule = f"a multiple of {factor}" + (f" from {fewest * factor} on" if size < fewest * factor else "")
            raise InputError(f"{key}: must be {rule} for model={settings.name}, is {size}; use {legal}")


def _unet(settings: ModelConfig) -> nn.Module:
    """MONAI's U-Net with residual units (Kerfoot et al. 2018)."""
    return UNet(
        **_ends(settings),
        channels=settings.channels,
        strides=_strides(settings),
        num_res_units=settings.num_res_units,
        act=settings.activation,
        norm=settings.norm,
        dropout=settings.dropout,
    )


def _attention_unet(settings: ModelConfig) -> nn.Module:
    """MONAI's attention U-Net (Oktay et al. 2018); its blocks are batch-normalised, with ReLU."""
    return AttentionUnet(
        **_ends(settings), channels=settings.channels, strides=_strides(settings), dropout=settings.dropout
    )


def _resunet_a(settings: ModelConfig) -> nn.Module:
    """The dilated residual U-Net (Diakogiannis et al. 2020)."""
    assert settings.dilations is not None  # the config is checked
    return ResUNetA(
        **_ends(settings),
        channels=settings.channels,
        strides=_strides(settings),
        dilations=settings.dilations,
        act=settings.activation,
        norm=settings.norm,
        dropout=settings.dropout,
    )


def _dynunet(settings: ModelConfig) -> nn.Module:
    """MONAI's copy of nnU-Net's network (Isensee et al. 2021), without deep supervision."""
    strides = _strides(settings)
    return DynUNet(
        **_ends(settings),
        kernel_size=[[3] * len(strides[0])] * len(settings.channels),
        strides=[[1] * len(strides[0]), *strides],
        upsample_kernel_size=strides,
        filters=settings.channels,
        dropout=settings.dropout or None,
        norm_name=(settings.norm, {"affine": True}),
        act_name=settings.activation,
        res_block=settings.num_res_units > 0,
    )


def _segresnet(settings: ModelConfig) -> nn.Module:
    """MONAI's residual encoder-decoder (Myronenko 2018), without the autoencoder; each level doubles the channels."""
    return SegResNet(
        **_ends(settings),
        init_filters=settings.channels[0],
        blocks_down=[settings.num_res_units] * len(settings.channels),
        blocks_up=[1] * len(settings.strides),
        act=settings.activation,
        norm=settings.norm,
        dropout_prob=settings.dropout or None,
    )


def _ends(settings: ModelConfig) -> dict[str, int]:
    """Return what goes in and comes out, in MONAI's words."""
    volumetric = is_3d(settings)
    return {
        "spatial_dims": 3 if volumetric else 2,
        "in_channels": 1 if volumetric else settings.num_slices,
        "out_channels": 1,
    }


def _strides(settings: ModelConfig) -> list[tuple[int, ...]]:
    return [tuple(level) for level in settings.strides]


NETWORKS: dict[ModelName, Callable[[ModelConfig], nn.Module]] = {
    "unet": _unet,
    "attention_unet": _attention_unet,
    "resunet_a": _resunet_a,
    "dynunet": _dynunet,
    "segresnet": _segresnet,
    "unet3d": _unet,
}
"""Builder of each network."""
