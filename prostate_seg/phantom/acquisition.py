"""Simulated acquisition: thick slices, bias field, Rician noise, gamma, and interpolation to the stored grid."""

from dataclasses import replace

import numpy as np

from prostate_seg.phantom.patient import Patient
from prostate_seg.phantom.study import Study
from prostate_seg.phantom.tissues import render_slice

ACQUIRED_PIXEL_MM = 0.7
"""Pixels are simulated at this size and interpolated to the stored size, as scanners do."""


def acquire(patient: Patient, study: Study, *, generator: np.random.Generator, difficulty: float) -> np.ndarray:
    """Return the image of a patient, shape [Z, Y, X], int16."""
    stored = study.geometry
    # The acquired grid has the same outer edges as the stored one, and pixels of about ACQUIRED_PIXEL_MM.
    extent_mm = stored.shape_vox[1] * stored.spacing_mm[1]
    num_pixels = round(extent_mm / ACQUIRED_PIXEL_MM)
    pixel_mm = extent_mm / num_pixels
    first = (pixel_mm / stored.spacing_mm[1] - 1) / 2
    placed = stored.window((0, first, first), (stored.shape_vox[0], num_pixels, num_pixels))
    acquired = replace(placed, spacing_mm=(stored.spacing_mm[0], pixel_mm, pixel_mm))
    signal = np.empty(acquired.shape_vox, dtype=np.float32)
    for index in range(len(signal)):
        signal[index] = render_slice(patient, study, acquired=acquired, index=index, difficulty=difficulty)
    np.maximum(signal, 0, out=signal)
    signal **= np.float32(study.gamma)
    # Bias field: the exponential of a quadratic along each axis, from -1 to 1 over the image.
    axes = [np.linspace(-1, 1, size, dtype=np.float32) for size in acquired.shape_vox]
    terms = [linear * axis + quadratic * axis**2 for axis, linear, quadratic in zip(axes, *study.bias, strict=True)]
    bias_z, bias_y, bias_x = (np.exp(term) for term in np.meshgrid(*terms, indexing="ij", sparse=True))
    signal *= bias_z * bias_y * bias_x
    # Rician noise: the magnitude after Gaussian noise in the real and in the imaginary channel.
    real = signal + study.noise * generator.standard_normal(signal.shape, dtype=np.float32)
    signal = np.hypot(real, study.noise * generator.standard_normal(signal.shape, dtype=np.float32))
    image = _interpolate(_interpolate(signal, axis=2, num=stored.shape_vox[1]), axis=1, num=stored.shape_vox[1])
    return np.rint(np.clip(image * np.float32(study.scale), 0, np.iinfo(np.int16).max)).astype(np.int16)


def _interpolate(array: np.ndarray, *, axis: int, num: int) -> np.ndarray:
    """Interpolate one axis to `num` samples over the same extent by Catmull-Rom's cubic; edges are repeated."""
    size = array.shape[axis]
    position = (np.arange(num) + 0.5) * size / num - 0.5
    base = np.floor(position).astype(int)
    t = (position - base).astype(np.float32).reshape([-1 if dim == axis else 1 for dim in range(array.ndim)])
    weights = (
        ((2 - t) * t - 1) * t / 2,
        ((3 * t - 5) * t * t + 2) / 2,
        ((4 - 3 * t) * t + 1) * t / 2,
        (t - 1) * t * t / 2,
    )
    taps = [array.take(np.clip(base + offset, 0, size - 1), axis=axis) for offset in (-1, 0, 1, 2)]
    return sum(weight * tap for weight, tap in zip(weights, taps, strict=True))
