"""Random changes to a whole batch at once, on the device where it lies.

Images are [B, C, Y, X] with mean 0 and SD 1, masks the same shape with 0 and 1. The slices of one input (the channels) move
together. Every change draws one strength per input; those not chosen get a strength that changes nothing, so that there
is one path and no branching by sample. Ranges follow nnU-Net's for T2-weighted MRI.
"""

import math

import torch
from torch.nn import functional

ROTATION_DEGREES = 15.0
SCALE_RANGE = (0.8, 1.25)
SHIFT_FRACTION = 0.08
"""Of the image's edge, in both directions."""
BEND_FRACTION = 0.02
"""SD of the displacement of the 5x5 knots of a smooth deformation, as a fraction of half the image's edge."""
NUM_BEND_KNOTS = 5
NUM_BIAS_KNOTS = 4
BIAS_STRENGTH = 0.3
"""SD of the logarithm of the multiplicative field."""
GAMMA_RANGE = (0.7, 1.5)
CONTRAST_RANGE = (0.75, 1.3)
BRIGHTNESS_SD = 0.15
NOISE_SD = 0.15
CHANCE = 0.3
"""Of each change of intensity to be applied to an input."""
CHANCE_OF_BEND = 0.5
CHANCE_OF_BLUR = 0.2


def augment(
    images: torch.Tensor, masks: torch.Tensor, *, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move, bend, mirror and relight a batch.

    Args:
        images: float [B, C, Y, X], mean 0 and SD 1.
        masks: float 0 or 1, [B, D, Y, X]; D may differ from C.
        generator: Source of randomness, on the device of the images.

    Returns:
        Images and masks of the same shapes; masks stay 0 or 1.
    """
    grid = _sampling_grid(images, generator=generator)
    both = torch.cat([images, masks], dim=1)
    moved = functional.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
    moved_images, moved_masks = moved.split([images.shape[1], masks.shape[1]], dim=1)
    return _relight(moved_images, generator=generator), (moved_masks > 0.5).to(masks.dtype)


def _sampling_grid(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Return where each output pixel is read from, [B, Y, X, 2] in -1..1."""
    num, _, height, width = images.shape
    angle = _uniform(num, -ROTATION_DEGREES, ROTATION_DEGREES, generator) * (math.pi / 180)
    scale = torch.exp(_uniform(num, math.log(SCALE_RANGE[0]), math.log(SCALE_RANGE[1]), generator))
    mirror = torch.where(_chosen(num, 0.5, generator), -1.0, 1.0)
    shift = _uniform(2 * num, -2 * SHIFT_FRACTION, 2 * SHIFT_FRACTION, generator).view(num, 2, 1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([torch.stack([cos * mirror, -sin], -1), torch.stack([sin * mirror, cos], -1)], 1)
    grid = functional.affine_grid(torch.cat([matrix, shift], dim=2), [num, 1, height, width], align_corners=False)
    return grid + _smooth_bend(num, height, width, generator=generator)


def _smooth_bend(num: int, height: int, width: int, *, generator: torch.Generator) -> torch.Tensor:
    strength = BEND_FRACTION * _chosen(num, CHANCE_OF_BEND, generator).view(num, 1, 1, 1)
    knots = _normal((num, 2, NUM_BEND_KNOTS, NUM_BEND_KNOTS), generator) * strength
    return _smooth_field(knots, height, width).permute(0, 2, 3, 1)


def _relight(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    num, _, height, width = images.shape
    images = _gamma(images, generator=generator)
    contrast = _strength(num, math.log(CONTRAST_RANGE[0]), math.log(CONTRAST_RANGE[1]), generator).exp()
    brightness = _chosen(num, CHANCE, generator) * BRIGHTNESS_SD * _normal((num,), generator)
    knots = _normal((num, 1, NUM_BIAS_KNOTS, NUM_BIAS_KNOTS), generator) * BIAS_STRENGTH
    knots = knots * _chosen(num, CHANCE, generator).view(num, 1, 1, 1)
    bias = _smooth_field(knots, height, width).exp()
    floor = images.amin(dim=(1, 2, 3), keepdim=True)
    lit = (images - floor) * bias * _per_input(contrast) + floor + _per_input(brightness)
    noise_sd = _strength(num, 0.0, NOISE_SD, generator)
    return _blur(lit, generator=generator) + _per_input(noise_sd) * _normal(tuple(lit.shape), generator)


def _gamma(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Bend the intensity scale between its own extremes."""
    gamma = _strength(len(images), math.log(GAMMA_RANGE[0]), math.log(GAMMA_RANGE[1]), generator).exp()
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    return ((images - low) / span).clamp(1e-6, 1.0).pow(_per_input(gamma)) * span + low


def _blur(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Mix some inputs with their 3x3 mean."""
    weight = _chosen(len(images), CHANCE_OF_BLUR, generator) * _uniform(len(images), 0.5, 1.0, generator)
    blurred = functional.avg_pool2d(images, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(images, blurred, _per_input(weight))


def _smooth_field(knots: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return functional.interpolate(knots, size=(height, width), mode="bicubic", align_corners=True)


def _strength(num: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """Draw a strength for the chosen inputs and 0, no change, for the others, [B]."""
    return _chosen(num, CHANCE, generator) * _uniform(num, low, high, generator)


def _chosen(num: int, chance: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(num, generator=generator, device=generator.device) < chance


def _uniform(num: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(num, generator=generator, device=generator.device)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _per_input(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)
