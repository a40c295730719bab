"""Inputs of a network from one study, shared by training and inference: normalised intensities, and the slices of each input.

Neighbours are channels in 2-D and 2.5-D; a 3-D network takes patches.
"""

from dataclasses import dataclass

import numpy as np
import torch

CLIP_PERCENTILES = (5.0, 95.0)
"""Clipping range with `train.zscore`, as in the public demo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensity:
    """Intensity statistics of one study."""

    low: float
    high: float
    mean: float
    """Of the clipped values."""
    sd: float
    """Of the clipped values; above 0."""


def measure_intensity(image: np.ndarray, *, clip: bool) -> Intensity:
    """Measure a preprocessed study, any shape; `low` and `high` are percentiles with `clip`, else the extremes."""
    low, high = np.percentile(image, CLIP_PERCENTILES) if clip else (image.min(), image.max())
    clipped = np.clip(image, low, high).astype(np.float32)
    sd = float(clipped.std())
    return Intensity(low=float(low), high=float(high), mean=float(clipped.mean()), sd=sd if sd > 0 else 1.0)


def normalise(image: np.ndarray, *, intensity: Intensity) -> np.ndarray:
    """Return the study with mean 0 and SD 1, float32, same shape."""
    clipped = np.clip(image, intensity.low, intensity.high).astype(np.float32)
    return (clipped - intensity.mean) / intensity.sd


def patches(starts: torch.Tensor, *, depth: int, first: torch.Tensor | int, last: torch.Tensor | int) -> torch.Tensor:
    """Return the slices of inputs, int64 [N, depth], from each start on; beyond the study its first or last one is repeated."""
    rows = starts[:, None] + torch.arange(depth, device=starts.device)
    low, high = (torch.as_tensor(end, device=starts.device).reshape(-1, 1) for end in (first, last))
    return torch.minimum(torch.maximum(rows, low), high)
