"""Which slices a network sees at once, as indices, for 2-D, 2.5-D and 3-D networks alike.

A row of indices is one input. Indices beyond a study repeat its first or last slice.
"""

import numpy as np


def neighbours(centers: np.ndarray, *, num_slices: int, first: np.ndarray | int, last: np.ndarray | int) -> np.ndarray:
    """Return [N, num_slices] slice indices around each center, kept within first..last."""
    offsets = np.arange(num_slices) - (num_slices - 1) // 2
    rows = np.asarray(centers)[:, None] + offsets
    return np.clip(rows, np.reshape(first, (-1, 1)), np.reshape(last, (-1, 1)))


def patch_starts(*, num_slices: int, depth: int) -> np.ndarray:
    """Return where 3-D patches of a study begin so that they overlap by half and end with the study."""
    last = max(0, num_slices - depth)
    return np.unique(np.append(np.arange(0, last, max(1, depth // 2)), last))


def patches(starts: np.ndarray, *, depth: int, first: np.ndarray | int, last: np.ndarray | int) -> np.ndarray:
    """Return [N, depth] slice indices from each start on, kept within first..last."""
    rows = np.asarray(starts)[:, None] + np.arange(depth)
    return np.clip(rows, np.reshape(first, (-1, 1)), np.reshape(last, (-1, 1)))
