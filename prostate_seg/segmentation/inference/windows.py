"""Slice indices of network inputs: neighbours as channels in 2-D and 2.5-D, patches in 3-D.

A row of indices is one input. Indices beyond a study repeat its first or last slice. All are int64 tensors on one device.
"""

import torch


def patches(starts: torch.Tensor, *, depth: int, first: torch.Tensor | int, last: torch.Tensor | int) -> torch.Tensor:
    """Return [N, depth] slice indices from each start on, clipped to first..last."""
    rows = starts[:, None] + torch.arange(depth, device=starts.device)
    low, high = (torch.as_tensor(end, device=starts.device).reshape(-1, 1) for end in (first, last))
    return torch.minimum(torch.maximum(rows, low), high)
