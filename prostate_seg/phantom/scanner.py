"""Scanners of the phantom: grids, contrast, noise, bias field, coil and positioning, which differ between centres."""

from dataclasses import dataclass

from prostate_seg.phantom.settings import ScannerName


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanner:
    """Ranges from which each study of a scanner is sampled; the defaults are those of PI-CAI."""

    pixel_spacing_range_mm: tuple[float, float] = (0.3, 0.6)
    """In-plane spacing of stored studies."""
    slice_spacing_range_mm: tuple[float, float] = (3.0, 3.6)
    acquired_pixel_mm: float = 0.7
    """Pixels are simulated at this size and interpolated to the stored size, as scanners do."""
    max_off_centre_mm: float = 10.0
    """Maximum distance of the gland's centre from the middle of the image along each image axis."""
    noise_factor: float = 1.0
    bias_factor: float = 1.0
    """Noise and bias field relative to those of `data.phantom.difficulty`."""
    coil_gain_range: tuple[float, float] | None = None
    """Relative gain beside the rectum; None for up to 1.5 times the difficulty."""
    gamma_range: tuple[float, float] = (0.9, 1.15)
    """Exponent of the signal: the contrast between dark and bright tissues."""


SCANNERS: dict[ScannerName, Scanner] = {
    "standard": Scanner(),
    "fine": Scanner(pixel_spacing_range_mm=(0.25, 0.35), acquired_pixel_mm=0.5, noise_factor=1.8),
    "coarse": Scanner(
        pixel_spacing_range_mm=(0.9, 1.4),
        slice_spacing_range_mm=(3.6, 4.5),
        acquired_pixel_mm=1.2,
        gamma_range=(0.8, 1),
    ),
    "noisy": Scanner(noise_factor=2.5, bias_factor=2.0, gamma_range=(0.6, 0.8)),
    "dark": Scanner(acquired_pixel_mm=0.9, noise_factor=1.5, gamma_range=(1.3, 1.7)),
    "coil": Scanner(pixel_spacing_range_mm=(0.4, 0.7), bias_factor=1.5, coil_gain_range=(2.0, 5.0)),
    "off_centre": Scanner(pixel_spacing_range_mm=(0.6, 0.9), bias_factor=2.0, max_off_centre_mm=20.0),
}
