"""What torchrun tells the processes that it has started, in their environment, and what it may be asked to start.

The first process runs the launcher; the others only train with it, and write and say nothing.
"""

import os
import re
from collections.abc import Sequence

from prostate_seg.errors import ConfigError


def num_processes() -> int:
    """Return how many processes work together; 1 without torchrun."""
    return _told("WORLD_SIZE", otherwise=1)


def rank() -> int:
    """Return the number of this process among all of them."""
    return _told("RANK", otherwise=0)


def num_processes_here() -> int:
    """Return how many of them run on this machine."""
    return _told("LOCAL_WORLD_SIZE", otherwise=1)


def rank_here() -> int:
    """Return the number of this process among those of its machine."""
    return _told("LOCAL_RANK", otherwise=0)


def require_one_training(arguments: Sequence[str]) -> None:
    """Check that a command is one that several processes can share.

    Raises:
        ConfigError: If it is another stage than train, or a multirun.
    """
    is_multirun = any(re.fullmatch(r"-m|--multirun|hydra\.mode=MULTIRUN", argument) for argument in arguments)
    if is_multirun or "stage=train" not in arguments:
        raise ConfigError(
            f"torchrun: its {num_processes()} processes share one stage=train, is {' '.join(arguments)}\n"
            "Give other stages, and multiruns, to python -m prostate_seg."
        )


def _told(name: str, *, otherwise: int) -> int:
    """Return a number that torchrun has set; others set variables of these names too, but not torchrun's own."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else otherwise
