"""What torchrun tells the processes that it has started, in their environment, and what it may be asked to start.

The first process runs the launcher; the others only train with it, and write and say nothing.
"""

import os
import re
from collections.abc import Sequence

from prostate_seg.common.errors import ConfigError


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
        ConfigError: If it is another stage than train, a multirun, or a question to Hydra.
    """
    others = r"-m|--multirun|hydra\.mode=MULTIRUN|--?(help|h|hydra-help|version|cfg|c|info|i)(=.*)?"
    if "stage=train" not in arguments or any(re.fullmatch(others, argument) for argument in arguments):
        raise ConfigError(
            f"torchrun: its {num_processes()} processes share one stage=train, is {' '.join(arguments)}\n"
            "Give all else to python -m prostate_seg."
        )


def _told(name: str, *, otherwise: int) -> int:
    """Return a number that torchrun has set; others set variables of these names too, but not torchrun's own."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else otherwise
