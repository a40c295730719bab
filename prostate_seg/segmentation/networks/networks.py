"""Network architectures by name, from MONAI or built from its blocks.

A 2-D network takes [B, num_slices, Y, X] and a 3-D network [B, 1, Z, Y, X]; both return one logit per voxel of the gland,
[B, 1, Y, X] or [B, 1, Z, Y, X].
"""

from typing import Any

import numpy as np
from monai.networks.nets.attentionunet import AttentionUnet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet
from torch import nn

from prostate_seg.common.errors import InputError
from prostate_seg.segmentation.networks.resunet_a import ResUNetA
from prostate_seg.segmentation.networks.settings import ModelConfig

MIN_COARSE_EDGE = 2
"""Smallest edge of the coarsest level in voxels: instance norm of a single voxel has no variance."""


def is_3d(settings: ModelConfig) -> bool:
    """Return whether the network has 3-D convolutions."""
    return len(settings.strides[0]) == 3


def build_network(settings: ModelConfig) -> nn.Module:
    """Return a new network with random weights."""
    volumetric = is_3d(settings)
    strides = [tuple(level) for level in settings.strides]
    shared: dict[str, Any] = {
        "spatial_dims": 3 if volumetric else 2,
        "in_channels": 1 if volumetric else settings.num_slices,
        "out_channels": 1,
    }
    act, norm, dropout = settings.activation, settings.norm, settings.dropout
    match settings.name:
        case "unet" | "unet3d":  # U-Net with residual units, Kerfoot et al. 2018
            return UNet(
                **shared,
                channels=settings.channels,
                strides=strides,
                num_res_units=settings.num_res_units,
                act=act,
                norm=norm,
                dropout=dropout,
            )
        case "attention_unet":  # Oktay et al. 2018; its blocks are fixed to batch norm and ReLU
            return AttentionUnet(**shared, channels=settings.channels, strides=strides, dropout=dropout)
        case "resunet_a":  # dilated residual U-Net, Diakogiannis et al. 2020
            assert settings.dilations is not None  # the config is checked
            return ResUNetA(
                **shared,
                channels=settings.channels,
                strides=strides,
                dilations=settings.dilations,
                act=act,
                norm=norm,
                dropout=dropout,
            )
        case "dynunet":  # the network of nnU-Net, Isensee et al. 2021, without deep supervision
            num_dims = shared["spatial_dims"]
            return DynUNet(
                **shared,
                kernel_size=[[3] * num_dims] * len(settings.channels),
                strides=[[1] * num_dims, *strides],
                upsample_kernel_size=strides,
                filters=settings.channels,
                dropout=dropout or None,
                norm_name=(norm, {"affine": True}),
                act_name=act,
                res_block=settings.num_res_units > 0,
            )
        case "segresnet":  # Myronenko 2018, without the autoencoder; channels double at each level
            return SegResNet(
                **shared,
                init_filters=settings.channels[0],
                blocks_down=[settings.num_res_units] * len(settings.channels),
                blocks_up=[1] * len(strides),
                act=act,
                norm=norm,
                dropout_prob=dropout or None,
            )


def require_legal_size(settings: ModelConfig, *, image_size: int) -> None:
    """Check that the input size is divisible by the product of the strides.

    Raises:
        InputError: If it is not, or the coarsest level is too small; the message has the next legal sizes.
    """
    factors = np.prod(np.array(settings.strides), axis=0)
    sizes = {"preprocess.image_size": (image_size, int(factors[-1]), MIN_COARSE_EDGE)}
    if is_3d(settings):
        sizes["model.num_slices"] = (settings.num_slices, int(factors[0]), 1)
    for key, (size, factor, fewest) in sizes.items():
        if size % factor or size < fewest * factor:
            below, above = size // factor * factor, (size // factor + 1) * factor
            legal = f"{below} or {above}" if below >= fewest * factor else f"{max(above, fewest * factor)}"
            rule = f"a multiple of {factor}" + (f" from {fewest * factor} on" if size < fewest * factor else "")
            raise InputError(f"{key}: must be {rule} for model={settings.name}, is {size}; use {legal}")
