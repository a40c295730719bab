"""Rank and world size of the processes that torchrun starts.

Rank 0 runs the launcher; the other processes only train with it, and write and log nothing.
"""

import os
from functools import partial


def _variable(name: str, *, default: int) -> int:
    """Return a number from the environment; Slurm, MPI and others set the same names, but not TORCHELASTIC_RUN_ID."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default


world_size = partial(_variable, "WORLD_SIZE", default=1)
"""Number of processes that train together; 1 without torchrun."""
rank = partial(_variable, "RANK", default=0)
"""Rank of this process."""
local_world_size = partial(_variable, "LOCAL_WORLD_SIZE", default=1)
"""Number of processes on this machine."""
local_rank = partial(_variable, "LOCAL_RANK", default=0)
"""Rank of this process among those of its machine."""
