"""Slice indices of network inputs: neighbours as channels in 2-D and 2.5-D, patches in 3-D.

A row of indices is one input. Indices beyond a study repeat its first or last slice.
"""

import numpy as np


def neighbours(centers: np.ndarray, *, num_slices: int, first: np.ndarray | int, last: np.ndarray | int) -> np.ndarray:
    """Return [N, num_slices] slice indices around each center, clipped to first..last."""
    return patches(np.asarray(centers) - (num_slices - 1) // 2, depth=num_slices, first=first, last=last)


def patches(starts: np.ndarray, *, depth: int, first: np.ndarray | int, last: np.ndarray | int) -> np.ndarray:
    """Return [N, depth] slice indices from each start on, clipped to first..last."""
    rows = np.asarray(starts)[:, None] + np.arange(depth)
    return np.clip(rows, np.reshape(first, (-1, 1)), np.reshape(last, (-1, 1)))
