"""Rank and world size of the processes that torchrun starts.

Rank 0 runs the launcher; the other processes only train with it, and write and log nothing.
"""

import os


def world_size() -> int:
    """Return the number of processes that train together; 1 without torchrun."""
    return _variable("WORLD_SIZE", default=1)


def rank() -> int:
    """Return the rank of this process."""
    return _variable("RANK", default=0)


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return _variable("LOCAL_WORLD_SIZE", default=1)


def local_rank() -> int:
    """Return the rank of this process among those of its machine."""
    return _variable("LOCAL_RANK", default=0)


def _variable(name: str, *, default: int) -> int:
    """Return a number from the environment; Slurm, MPI and others set the same names, but not TORCHELASTIC_RUN_ID."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default
