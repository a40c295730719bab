"""ResUNet-a: a U-Net with parallel dilated convolutions at each level, built from MONAI's blocks.

Source: Diakogiannis et al., "ResUNet-a: a deep learning framework for semantic segmentation of remotely sensed data",
ISPRS Journal of Photogrammetry and Remote Sensing 162 (2020). Norm and activation follow each convolution, as in MONAI.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.blocks.upsample import UpSample
from monai.networks.layers.factories import Pool
from torch import nn
from torch.nn import functional

PYRAMID = (1, 2, 4, 8)
"""Cells along each axis of the pyramid's pooling levels."""


class ResUNetA(nn.Module):
    """Encoder and decoder of dilated residual blocks with skip connections; pyramid pooling at the bottleneck and at the end.

    Arguments are named as in MONAI's UNet. `channels` and `dilations` have one entry per level, finest first; `dilations` lists
    those of the parallel branches.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        dilations: Sequence[Sequence[int]],
        act: str,
        norm: str,
        dropout: float,
    ) -> None:
        super().__init__()
        convolution = partial(Convolution, spatial_dims, act=act, norm=norm, dropout=dropout)

        def level(number: int) -> _DilatedResidual:
            return _DilatedResidual(convolution, channels[number], dilations[number])

        pairs = list(enumerate(zip(channels[:-1], channels[1:], strides, strict=True)))
        self.stem = nn.Sequential(convolution(in_channels, channels[0], kernel_size=1), level(0))
        self.down = nn.ModuleList(
            nn.Sequential(convolution(fine, coarse, kernel_size=1, strides=stride), level(number + 1))
            for number, (fine, coarse, stride) in pairs
        )
        self.middle = _PyramidPooling(spatial_dims, channels[-1], act=act, norm=norm)
        self.up = nn.ModuleList(
            UpSample(spatial_dims, coarse, fine, scale_factor=tuple(stride), mode="deconv")
            for _, (fine, coarse, stride) in pairs
        )
        self.join = nn.ModuleList(
            nn.Sequential(convolution(2 * fine, fine, kernel_size=1), level(number)) for number, (fine, _, _) in pairs
        )
        self.end = nn.Sequential(
            _PyramidPooling(spatial_dims, channels[0], act=act, norm=norm),
            Convolution(spatial_dims, channels[0], out_channels, kernel_size=1, conv_only=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [B, out_channels, ...] of an input [B, in_channels, ...]."""
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(down(skips[-1]))
        x = self.middle(skips.pop())
        for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
            x = join(torch.cat([up(x), skips.pop()], dim=1))
        return self.end(x)


class _DilatedResidual(nn.Module):
    """Residual block: the sum of the input and, for each dilation, of two convolutions."""

    def __init__(self, convolution: Callable[..., Convolution], channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        of_branch = partial(convolution, channels, channels)
        self.branches = nn.ModuleList(
            nn.Sequential(of_branch(dilation=dilation), of_branch(dilation=dilation)) for dilation in dilations
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((branch(x) for branch in self.branches), start=x)


class _PyramidPooling(nn.Module):
    """Concatenate the input with max pooling over grids of cells (Zhao et al. 2017; maxima as in ResUNet-a)."""

    def __init__(self, spatial_dims: int, channels: int, *, act: str, norm: str) -> None:
        super().__init__()
        part = max(1, channels // len(PYRAMID))
        pool = Pool["ADAPTIVEMAX", spatial_dims]
        self.pools = nn.ModuleList(
            nn.Sequential(pool(cells), Convolution(spatial_dims, channels, part, kernel_size=1, conv_only=True))
            for cells in PYRAMID
        )
        self.join = Convolution(
            spatial_dims, channels + part * len(PYRAMID), channels, kernel_size=1, act=act, norm=norm
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():  # ONNX has no adaptive pooling
            mixers = [mixer for _, mixer in (pool.children() for pool in self.pools)]
            pooled = [mixer(_cell_maxima(x, cells)) for mixer, cells in zip(mixers, PYRAMID, strict=True)]
        else:
            pooled = [pool(x) for pool in self.pools]
        scales = [functional.interpolate(cells, size=x.shape[2:], mode="nearest") for cells in pooled]
        return self.join(torch.cat([x, *scales], dim=1))


def _cell_maxima(x: torch.Tensor, cells: int) -> torch.Tensor:
    """Compute adaptive max pooling to `cells` along every spatial axis by plain maxima, which ONNX has."""
    for axis in range(2, x.ndim):
        size = x.shape[axis]
        edges = [(cell * size // cells, -((cell + 1) * size // -cells)) for cell in range(cells)]
        x = torch.cat([x.narrow(axis, a, b - a).amax(dim=axis, keepdim=True) for a, b in edges], dim=axis)
    return x
