"""Random spatial and intensity transforms of a whole batch, on its device.

Images are [B, C, Y, X] with mean 0 and SD 1, masks the same shape with 0 and 1. The slices of one input (the channels) share
one transform. Cheap transforms run on the whole batch, with a neutral strength for the inputs not chosen; expensive ones on a
fixed fraction of every batch. Neither waits for a number from the device. Most ranges are nnU-Net's for T2-weighted MRI; the
y axis points to the back of the patient, where an endorectal coil is placed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch.nn import functional

from prostate_seg.segmentation.training.settings import Augmentation

ROTATION_DEGREES = 15.0
SCALE_RANGE = (0.8, 1.25)
SHIFT_FRACTION = 0.08
"""Of the image's edge, in both directions."""
DEFORMATION_FRACTION = 0.02
"""SD of the displacement of the control points, as a fraction of half the image's edge."""
NUM_DEFORMATION_KNOTS = 5
"""Control points of the elastic deformation along each axis."""
NUM_BIAS_KNOTS = 4
COIL_GAIN = 4.0
"""Largest brightening beside an endorectal coil, relative to the unchanged far side."""
COIL_WIDTH_RANGE = (0.25, 0.8)
"""SD of the bright region, as a fraction of half the image's edge."""
DEFORMATION_PROBABILITY = 0.5
BLUR_PROBABILITY = 0.2
COIL_PROBABILITY = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensities:
    """Strength of the intensity transforms of an option of `train.augmentation`."""

    probability: float = 0.3
    """Of each transform without a probability of its own."""
    gamma_range: tuple[float, float] = (0.7, 1.5)
    contrast_range: tuple[float, float] = (0.75, 1.3)
    brightness_sd: float = 0.15
    noise_sd: float = 0.15
    bias_sd: float = 0.3
    """Of the logarithm of the multiplicative bias field."""
    coil: bool = False
    """Whether to simulate an endorectal coil in some of the images."""


INTENSITIES: dict[Augmentation, Intensities] = {
    "standard": Intensities(),
    "coil": Intensities(coil=True),
    "strong": Intensities(
        probability=0.5,
        gamma_range=(0.5, 2.0),
        contrast_range=(0.65, 1.5),
        brightness_sd=0.3,
        noise_sd=0.3,
        bias_sd=0.45,
    ),
}


def augment(
    images: torch.Tensor,
    masks: torch.Tensor,
    *,
    rng: torch.Generator,
    kind: Augmentation = "standard",
    are_bits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply random affine, elastic, flip and intensity transforms to a batch; shapes stay, and masks stay 0 or 1, or bits.

    Args:
        images: float [B, C, Y, X], mean 0 and SD 1.
        masks: float 0 or 1, [B, D, Y, X]; D may differ from C.
        rng: Random number generator on the device of the images.
        kind: A key of `INTENSITIES`.
        are_bits: Whether the masks have several regions as bits; they are moved by nearest neighbour, in one pass for all.
    """
    grid = _sampling_grid(images, rng=rng)
    sample = partial(functional.grid_sample, grid=grid, padding_mode="border", align_corners=False)
    if are_bits:
        moved_images, moved_masks = sample(images, mode="bilinear"), sample(masks, mode="nearest")
    else:
        sizes = [images.shape[1], masks.shape[1]]
        moved_images, moved_masks = sample(torch.cat([images, masks], dim=1), mode="bilinear").split(sizes, dim=1)
        moved_images, moved_masks = moved_images.contiguous(), moved_masks > 0.5
    return _transform_intensity_(moved_images, INTENSITIES[kind], rng=rng), moved_masks.to(masks.dtype)


def _sampling_grid(images: torch.Tensor, *, rng: torch.Generator) -> torch.Tensor:
    """Return the coordinates at which each output pixel is sampled, [B, Y, X, 2] in -1..1.

    A grid is a weighted sum of fixed basis images (x, y, 1 and one bump per control point): one matrix product for the batch.
    """
    num, _, height, width = images.shape
    # Affine part, [B, 3, 2]: rotation, isotropic scale, left-right flip (the gland is nearly symmetric) and translation.
    angle = _uniform(num, -ROTATION_DEGREES, ROTATION_DEGREES, rng) * (math.pi / 180)
    scale = torch.exp(_uniform(num, math.log(SCALE_RANGE[0]), math.log(SCALE_RANGE[1]), rng))
    flip = torch.where(_chosen(num, 0.5, rng), -1.0, 1.0)
    shift = _uniform(2 * num, -2 * SHIFT_FRACTION, 2 * SHIFT_FRACTION, rng).view(num, 2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    affine = torch.stack([torch.stack([cos * flip, sin * flip], -1), torch.stack([-sin, cos], -1), shift], dim=1)
    # Elastic part, [B, control points, 2]: displacements, 0 for the inputs that are not chosen.
    strength = DEFORMATION_FRACTION * _chosen(num, DEFORMATION_PROBABILITY, rng).view(num, 1, 1)
    displacement = strength * _normal((num, NUM_DEFORMATION_KNOTS**2, 2), rng)
    weights = torch.cat([affine, displacement], dim=1)
    coordinates = weights.transpose(1, 2).flatten(0, 1) @ _grid_basis(height, width, images.device)
    return coordinates.view(num, 2, height, width).permute(0, 2, 3, 1)


@cache
def _grid_basis(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return x, y, 1 and the bump of each control point at every pixel, [3 + NUM_DEFORMATION_KNOTS ** 2, Y * X]."""
    y, x = (_line(size, device) for size in (height, width))
    plane = [x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width, device=device)]
    bumps_y, bumps_x = (_bumps(size, NUM_DEFORMATION_KNOTS, device) for size in (height, width))
    bumps = torch.einsum("yi,xj->ijyx", bumps_y, bumps_x).flatten(0, 1)
    return torch.cat([torch.stack(plane), bumps]).flatten(1)


@cache
def _line(size: int, device: torch.device) -> torch.Tensor:
    """Return the coordinates of the pixels of a line, -1 to 1 from edge to edge."""
    return torch.arange(size, device=device) * (2 / size) + (1 / size - 1)


@cache
def _bumps(size: int, num_knots: int, device: torch.device) -> torch.Tensor:
    """Return the cubic interpolation weight of each control point at every pixel of a line, [size, num_knots]."""
    knots = torch.eye(num_knots, device=device)[None, :, :, None]
    lines = functional.interpolate(knots, size=(size, 1), mode="bicubic", align_corners=True)
    return lines[0, :, :, 0].T.contiguous()


def _transform_intensity_(images: torch.Tensor, kind: Intensities, *, rng: torch.Generator) -> torch.Tensor:
    """Apply the intensity transforms in place: allocating memory costs more than the arithmetic."""
    _scale_intensity_(images, kind, rng=rng)
    num = len(images)
    expensive: list[tuple[Callable[..., torch.Tensor], float]] = [
        (_coil, COIL_PROBABILITY),
        (partial(_gamma, gamma_range=kind.gamma_range), kind.probability),
        (_blur, BLUR_PROBABILITY),
        (partial(_noise, noise_sd=kind.noise_sd), kind.probability),
    ]
    for transform, probability in expensive if kind.coil else expensive[1:]:
        chosen = torch.randperm(num, generator=rng, device=images.device)[: max(1, round(probability * num))]
        images[chosen] = transform(images[chosen], rng=rng)
    return images


def _scale_intensity_(images: torch.Tensor, kind: Intensities, *, rng: torch.Generator) -> torch.Tensor:
    """Apply contrast, brightness and a smooth multiplicative bias field about the lowest intensity of each input; cheap."""
    num, _, height, width = images.shape
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    is_contrast = _chosen(num, kind.probability, rng)
    contrast = (is_contrast * _log_uniform(num, kind.contrast_range, rng)).exp()
    brightness = _chosen(num, kind.probability, rng) * kind.brightness_sd * _normal((num,), rng)
    knots = _normal((num, 1, NUM_BIAS_KNOTS, NUM_BIAS_KNOTS), rng) * kind.bias_sd
    knots = knots * _per_input(_chosen(num, kind.probability, rng))
    bumps_y, bumps_x = (_bumps(size, NUM_BIAS_KNOTS, images.device) for size in (height, width))
    bias = (bumps_y @ knots @ bumps_x.T).exp()
    return images.sub_(low).mul_(bias * _per_input(contrast)).add_(low + _per_input(brightness))


def _coil(images: torch.Tensor, *, rng: torch.Generator) -> torch.Tensor:
    """Brighten a region behind the gland as an endorectal coil does; mean and SD, which inference would restore, stay."""
    num, _, height, width = images.shape
    gain, spread = _uniform(num, 0.0, COIL_GAIN, rng), _uniform(num, *COIL_WIDTH_RANGE, rng)[:, None]
    y, x = (
        torch.exp(-(((_line(size, images.device) - _uniform(num, *centers, rng)[:, None]) / spread) ** 2) / 2)
        for size, centers in ((height, (-0.2, 1.0)), (width, (-0.6, 0.6)))
    )
    sd, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    brightened = (images - low) * (1 + _per_input(gain) * y[:, None, :, None] * x[:, None, None, :])
    new_sd, new_mean = torch.std_mean(brightened, dim=(1, 2, 3), keepdim=True)
    return brightened.sub_(new_mean).mul_(sd / new_sd.clamp_min(1e-6)).add_(mean)


def _gamma(images: torch.Tensor, *, rng: torch.Generator, gamma_range: tuple[float, float]) -> torch.Tensor:
    """Apply a gamma curve between the lowest and the highest intensity of each input."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    gamma = _log_uniform(len(images), gamma_range, rng).exp()
    return images.sub_(low).div_(span).clamp_(1e-6, 1.0).pow_(_per_input(gamma)).mul_(span).add_(low)


def _blur(images: torch.Tensor, *, rng: torch.Generator) -> torch.Tensor:
    """Mix every pixel with the mean of itself and its four neighbours; several times faster than average pooling."""
    fraction = _per_input(_uniform(len(images), 0.5, 1.0, rng)) / 5
    blurred = images * (1 - 4 * fraction)
    for axis in (-2, -1):
        size = images.shape[axis]
        blurred.narrow(axis, 1, size - 1).addcmul_(images.narrow(axis, 0, size - 1), fraction)
        blurred.narrow(axis, 0, size - 1).addcmul_(images.narrow(axis, 1, size - 1), fraction)
        for end in (0, size - 1):  # replicate padding
            blurred.narrow(axis, end, 1).addcmul_(images.narrow(axis, end, 1), fraction)
    return blurred


def _noise(images: torch.Tensor, *, rng: torch.Generator, noise_sd: float) -> torch.Tensor:
    sd = _uniform(len(images), 0.0, noise_sd, rng)
    return images.addcmul_(_normal(tuple(images.shape), rng), _per_input(sd))


def _chosen(num: int, probability: float, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(num, generator=rng, device=rng.device) < probability


def _uniform(num: int, low: float, high: float, rng: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(num, generator=rng, device=rng.device)


def _log_uniform(num: int, bounds: tuple[float, float], rng: torch.Generator) -> torch.Tensor:
    """Return logarithms of factors between two bounds."""
    return _uniform(num, math.log(bounds[0]), math.log(bounds[1]), rng)


def _normal(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=rng, device=rng.device)


def _per_input(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)
