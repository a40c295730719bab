"""Graded perturbations that scanners and positioning cause, for the stress test: image and reference in, both perturbed out.

Volumes are [Z, Y, X] in LPS: y points to the back of the patient. MONAI's transforms are used where they are deterministic or
take a random state; ghosting, the coil and the field of view are here. Every function returns None if the case cannot have
the perturbation, such as a field of view that the gland does not fit into.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.transforms.intensity.array import AdjustContrast, GaussianSmooth, RandBiasField, RandRicianNoise
from monai.transforms.spatial.array import Rotate
from torch.nn import functional

from prostate_seg.imaging.geometry import Volume, bounding_box

COIL_SD_MM = 30.0
"""SD of the bright region of an endorectal coil."""
COIL_BEHIND_MM = 10.0
"""Distance of the coil's centre behind the gland."""
NUM_GHOSTS = 4
"""Copies along the phase-encoding axis."""
KEPT_CENTRE_FRACTION = 0.02
"""Part of k-space that motion leaves unchanged."""

Pair = tuple[Volume, np.ndarray]
"""Image, and label map [Z, Y, X] on its grid."""
Apply = Callable[[Volume, np.ndarray, float, int], Pair | None]
"""Perturbs an image and its label map, with a strength and a seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """A perturbation with its strengths."""

    apply: Apply
    unit: str
    strengths: tuple[float, ...]
    """From weak to strong."""


def _intensities(transform: Callable[[torch.Tensor, float, int], torch.Tensor]) -> Apply:
    """Return a perturbation of the intensities above the lowest one, from a function of a tensor [1, Z, Y, X]."""

    def apply(image: Volume, label_map: np.ndarray, strength: float, seed: int) -> Pair:
        array = image.array.astype(np.float32)
        low = float(array.min())
        changed = transform(torch.from_numpy(array - low)[None], strength, seed)
        return replace(image, array=np.asarray(changed[0], dtype=np.float32) + low), label_map

    return apply


def _bias_field(image: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    transform = RandBiasField(coeff_range=(-strength, strength), prob=1.0).set_random_state(seed)
    return torch.as_tensor(transform(image))


def _noise(image: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """Add Rician noise, as magnitude images have it; the strength is relative to the SD of the image."""
    transform = RandRicianNoise(prob=1.0, std=strength, relative=True, sample_std=False).set_random_state(seed)
    return torch.as_tensor(transform(image))


def _gamma(image: torch.Tensor, strength: float, _seed: int) -> torch.Tensor:
    return torch.as_tensor(AdjustContrast(gamma=strength)(image))


def _ghosting(image: torch.Tensor, strength: float, _seed: int) -> torch.Tensor:
    """Weaken every fourth line of k-space along y, except at its centre: periodic motion during the acquisition."""
    spectrum = torch.fft.fft(image, dim=-2)
    frequency = torch.fft.fftfreq(image.shape[-2]).abs()
    is_weak = (torch.arange(image.shape[-2]) % NUM_GHOSTS == 0) & (frequency > KEPT_CENTRE_FRACTION / 2)
    factor = torch.where(is_weak, 1 - strength, 1.0)
    return torch.fft.ifft(spectrum * factor[:, None], dim=-2).abs()


def _blur(image: Volume, label_map: np.ndarray, strength: float, _seed: int) -> Pair:
    """Smooth the slices with a Gaussian whose SD is the strength, in mm."""
    _, y_mm, x_mm = image.geometry.spacing_mm
    smooth = GaussianSmooth(sigma=(0.0, strength / y_mm, strength / x_mm))
    array = np.asarray(smooth(torch.from_numpy(image.array.astype(np.float32))[None])[0])
    return replace(image, array=array), label_map


def _endorectal_coil(image: Volume, label_map: np.ndarray, strength: float, _seed: int) -> Pair | None:
    """Brighten the region behind the gland; the strength is the gain at the coil."""
    _, rows, columns = bounding_box(label_map > 0)
    (_, height, width), (_, y_mm, x_mm) = image.geometry.shape_vox, image.geometry.spacing_mm
    behind_mm, middle_mm = rows.stop * y_mm + COIL_BEHIND_MM, (columns.start + columns.stop) / 2 * x_mm
    y, x = (
        np.exp(-(((np.arange(size) + 0.5) * spacing_mm - centre_mm) ** 2) / (2 * COIL_SD_MM**2))
        for size, spacing_mm, centre_mm in ((height, y_mm, behind_mm), (width, x_mm, middle_mm))
    )
    low = float(image.array.min())
    gain = 1 + strength * y[:, None] * x
    return replace(image, array=((image.array - low) * gain + low).astype(np.float32)), label_map


def _sampled(axes: tuple[int, ...]) -> Apply:
    """Return a perturbation that averages voxels to a size in mm along some axes, and interpolates them again."""

    def apply(image: Volume, label_map: np.ndarray, strength: float, _seed: int) -> Pair | None:
        shape, spacing_mm = image.geometry.shape_vox, image.geometry.spacing_mm
        if all(spacing_mm[axis] >= strength for axis in axes):
            return None
        coarse = [
            max(2, round(size * spacing_mm[axis] / max(strength, spacing_mm[axis]))) if axis in axes else size
            for axis, size in enumerate(shape)
        ]
        array = torch.from_numpy(image.array.astype(np.float32))[None, None]
        averaged = functional.interpolate(array, size=coarse, mode="area")
        again = functional.interpolate(averaged, size=shape, mode="trilinear")
        return replace(image, array=again[0, 0].numpy()), label_map

    return apply


def _shift(image: Volume, label_map: np.ndarray, strength: float, _seed: int) -> Pair:
    """Move the centre of the image by the strength, in mm, to the patient's left of the gland.

    A strip at the right is removed, as far as the gland is not cut; for the rest, air is added at the left.
    """
    num_vox = round(2 * strength / image.geometry.spacing_mm[2])
    removed = min(num_vox, bounding_box(label_map > 0)[2].start)
    pad = ((0, 0), (0, 0), (0, num_vox - removed))
    array = np.pad(image.array[..., removed:], pad, constant_values=image.array.min())
    geometry = image.geometry.window([0, 0, removed], array.shape)
    return replace(image, array=array, geometry=geometry), np.pad(label_map[..., removed:], pad)


def _field_of_view(image: Volume, label_map: np.ndarray, strength: float, _seed: int) -> Pair | None:
    """Keep the central part of the slices, with an edge of the strength in mm; the gland must fit into it."""
    part = [slice(None)]
    for size, spacing_mm in zip(image.geometry.shape_vox[1:], image.geometry.spacing_mm[1:], strict=True):
        num_kept = min(size, round(strength / spacing_mm))
        first = (size - num_kept) // 2
        part.append(slice(first, first + num_kept))
    kept = label_map[tuple(part)]
    if kept.shape == label_map.shape or (kept > 0).sum() < (label_map > 0).sum():
        return None
    geometry = image.geometry.window([0, part[1].start, part[2].start], kept.shape)
    return replace(image, array=image.array[tuple(part)], geometry=geometry), kept


def _rotation(image: Volume, label_map: np.ndarray, strength: float, _seed: int) -> Pair | None:
    """Rotate the slices about the centre of the image; the strength is in degrees."""
    _, y_mm, x_mm = image.geometry.spacing_mm
    if not np.isclose(y_mm, x_mm, rtol=0.01):
        return None
    angle = (np.deg2rad(strength), 0.0, 0.0)
    moved = []
    for array, mode in ((image.array.astype(np.float32), "bilinear"), (label_map.astype(np.float32), "nearest")):
        rotate = Rotate(angle=angle, keep_size=True, mode=mode, padding_mode="border")
        moved.append(np.asarray(rotate(torch.from_numpy(array)[None])[0]))
    return replace(image, array=moved[0]), np.rint(moved[1]).astype(label_map.dtype)


PERTURBATIONS: dict[str, Perturbation] = {
    "bias_field": Perturbation(apply=_intensities(_bias_field), unit="coefficient", strengths=(0.1, 0.2, 0.3, 0.4)),
    "endorectal_coil": Perturbation(apply=_endorectal_coil, unit="gain", strengths=(1, 2, 4, 8)),
    "noise": Perturbation(apply=_intensities(_noise), unit="SD of the image", strengths=(0.1, 0.2, 0.4, 0.8)),
    "ghosting": Perturbation(apply=_intensities(_ghosting), unit="fraction", strengths=(0.2, 0.4, 0.6, 0.8)),
    "blur": Perturbation(apply=_blur, unit="SD in mm", strengths=(0.5, 1, 1.5, 2)),
    "gamma": Perturbation(apply=_intensities(_gamma), unit="exponent", strengths=(1.25, 1.5, 2, 3)),
    "slice_thickness": Perturbation(apply=_sampled((0,)), unit="mm", strengths=(4, 5, 6, 8)),
    "pixel_size": Perturbation(apply=_sampled((1, 2)), unit="mm", strengths=(1, 1.5, 2, 3)),
    "shift": Perturbation(apply=_shift, unit="mm", strengths=(10, 20, 30, 40)),
    "field_of_view": Perturbation(apply=_field_of_view, unit="mm", strengths=(120, 100, 80, 70)),
    "rotation": Perturbation(apply=_rotation, unit="degrees", strengths=(5, 10, 20, 30)),
}
"""By name."""
