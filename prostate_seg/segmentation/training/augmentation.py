"""Random changes to a whole batch at once, on the device where it lies.

Images are [B, C, Y, X] with mean 0 and SD 1, masks the same shape with 0 and 1. The slices of one input (the channels) move
together. Every change draws one strength per input. Cheap changes go over the whole batch, with a strength that changes
nothing for the inputs not chosen; dear ones over a fixed part of every batch. Neither waits for a number from the device.
Most ranges follow nnU-Net's for T2-weighted MRI; the y axis runs to the back, where an endorectal coil lies.
"""

import math
from functools import cache

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
COIL_GAIN = 4.0
"""Largest brightening beside an endorectal coil, over the unchanged far side."""
COIL_WIDTH_RANGE = (0.25, 0.8)
"""SD of the bright region, as a fraction of half the image's edge."""
GAMMA_RANGE = (0.7, 1.5)
CONTRAST_RANGE = (0.75, 1.3)
BRIGHTNESS_SD = 0.15
NOISE_SD = 0.15
CHANCE = 0.3
"""Of each change of intensity to be applied to an input."""
CHANCE_OF_BEND = 0.5
CHANCE_OF_BLUR = 0.2
CHANCE_OF_COIL = 0.15


def augment(
    images: torch.Tensor, masks: torch.Tensor, *, generator: torch.Generator, coil: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move, bend, mirror and relight a batch.

    Args:
        images: float [B, C, Y, X], mean 0 and SD 1.
        masks: float 0 or 1, [B, D, Y, X]; D may differ from C.
        generator: Source of randomness, on the device of the images.
        coil: Whether an endorectal coil is drawn into some of the images.

    Returns:
        Images and masks of the same shapes; masks stay 0 or 1.
    """
    grid = _sampling_grid(images, generator=generator)
    both = torch.cat([images, masks], dim=1)
    moved = functional.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
    num_slices = images.shape[1]
    moved_images, moved_masks = moved[:, :num_slices].contiguous(), moved[:, num_slices:] > 0.5
    return _relight_(moved_images, generator=generator, coil=coil), moved_masks.to(masks.dtype)


def _sampling_grid(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Return where each output pixel is read from, [B, Y, X, 2] in -1..1.

    A grid is a sum of fixed pictures (x, y, 1 and the knots' bumps) with weights per input: one matrix product.
    """
    num, _, height, width = images.shape
    weights = torch.cat([_affine_weights(num, generator=generator), _bend_weights(num, generator=generator)], dim=1)
    coordinates = weights.transpose(1, 2).flatten(0, 1) @ _grid_pictures(height, width, images.device)
    return coordinates.view(num, 2, height, width).permute(0, 2, 3, 1)


def _affine_weights(num: int, *, generator: torch.Generator) -> torch.Tensor:
    """Return the weights of x, y and 1 in both coordinates of the grid, [B, 3, 2]."""
    angle = _uniform(num, -ROTATION_DEGREES, ROTATION_DEGREES, generator) * (math.pi / 180)
    scale = torch.exp(_uniform(num, math.log(SCALE_RANGE[0]), math.log(SCALE_RANGE[1]), generator))
    mirror = torch.where(_chosen(num, 0.5, generator), -1.0, 1.0)
    shift = _uniform(2 * num, -2 * SHIFT_FRACTION, 2 * SHIFT_FRACTION, generator).view(num, 2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    return torch.stack([torch.stack([cos * mirror, sin * mirror], -1), torch.stack([-sin, cos], -1), shift], dim=1)


def _bend_weights(num: int, *, generator: torch.Generator) -> torch.Tensor:
    """Return how far each knot moves, [B, NUM_BEND_KNOTS ** 2, 2]; 0 for the inputs that are not chosen."""
    strength = BEND_FRACTION * _chosen(num, CHANCE_OF_BEND, generator).view(num, 1, 1)
    return strength * _normal((num, NUM_BEND_KNOTS**2, 2), generator)


@cache
def _grid_pictures(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return x, y, 1 and the bump of each knot at every pixel, [3 + NUM_BEND_KNOTS ** 2, Y * X]."""
    y, x = (_line(size, device) for size in (height, width))
    plane = [x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width, device=device)]
    bumps_y, bumps_x = (_bumps(size, NUM_BEND_KNOTS, device) for size in (height, width))
    bumps = torch.einsum("yi,xj->ijyx", bumps_y, bumps_x).flatten(0, 1)
    return torch.cat([torch.stack(plane), bumps]).flatten(1)


@cache
def _line(size: int, device: torch.device) -> torch.Tensor:
    """Return the coordinates of the pixels of a line, -1 to 1 from edge to edge."""
    return torch.arange(size, device=device) * (2 / size) + (1 / size - 1)


@cache
def _bumps(size: int, num_knots: int, device: torch.device) -> torch.Tensor:
    """Return the cubic weight of each knot at every pixel of a line, [size, num_knots]."""
    knots = torch.eye(num_knots, device=device)[None, :, :, None]
    lines = functional.interpolate(knots, size=(size, 1), mode="bicubic", align_corners=True)
    return lines[0, :, :, 0].T.contiguous()


def _relight_(images: torch.Tensor, *, generator: torch.Generator, coil: bool) -> torch.Tensor:
    """Change the intensities in place: fresh memory costs more than the arithmetic."""
    num, _, height, width = images.shape
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    contrast = _strength(num, math.log(CONTRAST_RANGE[0]), math.log(CONTRAST_RANGE[1]), generator).exp()
    brightness = _chosen(num, CHANCE, generator) * BRIGHTNESS_SD * _normal((num,), generator)
    knots = _normal((num, 1, NUM_BIAS_KNOTS, NUM_BIAS_KNOTS), generator) * BIAS_STRENGTH
    bias = _smooth_field(knots * _per_input(_chosen(num, CHANCE, generator)), height, width).exp()
    images.sub_(low).mul_(bias * _per_input(contrast)).add_(low + _per_input(brightness))
    dear = [(_gamma, CHANCE), (_blur, CHANCE_OF_BLUR), (_noise, CHANCE)]
    for change, chance in [(_coil, CHANCE_OF_COIL), *dear] if coil else dear:
        some = torch.randperm(num, generator=generator, device=images.device)[: max(1, round(chance * num))]
        images[some] = change(images[some], generator=generator)
    return images


def _coil(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Brighten a region behind the gland, as an endorectal coil does; mean and SD, which inference would restore, stay."""
    num, _, height, width = images.shape
    gain, spread = _uniform(num, 0.0, COIL_GAIN, generator), _uniform(num, *COIL_WIDTH_RANGE, generator)[:, None]
    y, x = (
        torch.exp(-(((_line(size, images.device) - _uniform(num, *centers, generator)[:, None]) / spread) ** 2) / 2)
        for size, centers in ((height, (-0.2, 1.0)), (width, (-0.6, 0.6)))
    )
    sd, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    lit = (images - low) * (1 + _per_input(gain) * y[:, None, :, None] * x[:, None, None, :])
    new_sd, new_mean = torch.std_mean(lit, dim=(1, 2, 3), keepdim=True)
    return lit.sub_(new_mean).mul_(sd / new_sd.clamp_min(1e-6)).add_(mean)


def _gamma(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Bend the intensity scale between its own extremes."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    gamma = _uniform(len(images), math.log(GAMMA_RANGE[0]), math.log(GAMMA_RANGE[1]), generator).exp()
    return images.sub_(low).div_(span).clamp_(1e-6, 1.0).pow_(_per_input(gamma)).mul_(span).add_(low)


def _blur(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Mix every pixel with the mean of itself and its four neighbours; several times faster than pooling."""
    part = _per_input(_uniform(len(images), 0.5, 1.0, generator)) / 5
    blurred = images * (1 - 4 * part)
    for axis in (-2, -1):
        size = images.shape[axis]
        blurred.narrow(axis, 1, size - 1).addcmul_(images.narrow(axis, 0, size - 1), part)
        blurred.narrow(axis, 0, size - 1).addcmul_(images.narrow(axis, 1, size - 1), part)
        for end in (0, size - 1):  # beyond the border lies the border's own value
            blurred.narrow(axis, end, 1).addcmul_(images.narrow(axis, end, 1), part)
    return blurred


def _noise(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Add normal noise."""
    sd = _uniform(len(images), 0.0, NOISE_SD, generator)
    return images.addcmul_(_normal(tuple(images.shape), generator), _per_input(sd))


def _smooth_field(knots: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return smooth pictures [B, 1, Y, X] through knots [B, 1, K, K]."""
    y, x = (_bumps(size, knots.shape[-1], knots.device) for size in (height, width))
    return y @ knots @ x.T


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
