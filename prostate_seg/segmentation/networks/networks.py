"""Network architectures by name, from MONAI or built from its blocks.

A 2-D network takes [B, num_slices, Y, X] and a 3-D network [B, 1, Z, Y, X]; both return a logit per region and voxel,
[B, regions, Y, X] or [B, regions, Z, Y, X].
"""

import re
from typing import Any

import numpy as np
import torch
from monai.networks.layers.factories import Act
from monai.networks.nets.attentionunet import AttentionUnet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet
from torch import nn

from prostate_seg.common.errors import InputError
from prostate_seg.segmentation.networks.prelu import PReLU
from prostate_seg.segmentation.networks.resunet_a import ResUNetA
from prostate_seg.segmentation.networks.settings import ModelConfig, ModelName

MIN_COARSE_EDGE = 2
"""Smallest edge of the coarsest level in voxels: instance norm of a single voxel has no variance."""

ACTIVATIONS = {"prelu": "prelu_with_one_slope"}
"""Names of activations in MONAI's factory, where they differ from model.activation."""
Act.add_factory_class(ACTIVATIONS["prelu"], PReLU)

DECODER: dict[ModelName, str] = {
    "unet": r"model(\.1\.submodule)*\.2\.",
    "unet3d": r"model(\.1\.submodule)*\.2\.",
    "attention_unet": r"model\.2\.|model\.(.*\.)?(attention|upconv|merge)\.",
    "resunet_a": r"(up|join|end)\.",
    "dynunet": r"(upsamples|output_block)\.",
    "segresnet": r"(up_layers|up_samples|conv_final)\.",
}
"""Start of the names of the decoder's parameters; all others, down to the coarsest level, are the encoder's."""


def is_3d(settings: ModelConfig) -> bool:
    """Return whether the network has 3-D convolutions."""
    return len(settings.strides[0]) == 3


def build_network(settings: ModelConfig, *, num_regions: int = 1) -> nn.Module:
    """Return a new network with random weights; a 2-D one has the layout channels last, faster on CPUs and GPUs."""
    network = _build(settings, num_regions=num_regions)
    return network if is_3d(settings) else network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build(settings: ModelConfig, *, num_regions: int) -> nn.Module:
    num_dims, in_channels = (3, 1) if is_3d(settings) else (2, settings.num_slices)
    channels, strides = settings.channels, [tuple(level) for level in settings.strides]
    norm, dropout, num_res_units = settings.norm, settings.dropout, settings.num_res_units
    dims = {"spatial_dims": num_dims, "in_channels": in_channels, "out_channels": num_regions}
    levels: dict[str, Any] = {**dims, "channels": channels, "strides": strides, "dropout": dropout}
    layers: dict[str, Any] = {"act": ACTIVATIONS.get(settings.activation, settings.activation), "norm": norm}
    match settings.name:
        case "unet" | "unet3d":  # U-Net with residual units, Kerfoot et al. 2018
            return UNet(**levels, **layers, num_res_units=num_res_units)
        case "attention_unet":  # Oktay et al. 2018; its blocks are fixed to batch norm and ReLU
            return AttentionUnet(**levels)
        case "resunet_a":  # dilated residual U-Net, Diakogiannis et al. 2020
            assert settings.dilations is not None  # the config is checked
            return ResUNetA(**levels, **layers, dilations=settings.dilations)
        case "dynunet":  # the network of nnU-Net, Isensee et al. 2021, without deep supervision
            return DynUNet(
                **dims,
                kernel_size=[[3] * num_dims] * len(channels),
                strides=[[1] * num_dims, *strides],
                upsample_kernel_size=strides,
                filters=channels,
                dropout=dropout or None,
                norm_name=(norm, {"affine": True}),
                act_name=layers["act"],
                res_block=num_res_units > 0,
            )
        case "segresnet":  # Myronenko 2018, without the autoencoder; channels double at each level
            return SegResNet(
                **dims,
                **layers,
                init_filters=channels[0],
                blocks_down=[num_res_units] * len(channels),
                blocks_up=[1] * len(strides),
                dropout_prob=dropout or None,
            )


def encoder_parameters(network: nn.Module, *, name: ModelName) -> dict[str, nn.Parameter]:
    """Return the parameters of a network's encoder, by name."""
    decoder = re.compile(DECODER[name])
    return {key: value for key, value in network.named_parameters() if not decoder.match(key)}


def require_legal_size(settings: ModelConfig, *, image_size: int) -> None:
    """Raise InputError, with the next legal sizes, unless the strides divide the input and leave a coarsest level."""
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
