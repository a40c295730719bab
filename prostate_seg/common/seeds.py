"""Independent random streams from one seed.

Each use of randomness has a stream of its own: NumPy's SeedSequence of seed and fold, with the purpose and its counters as
spawn key. Seeds are never added up, because seed 1 with fold 1 would then be seed 2 with fold 0.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the random numbers of a stream are for; a number keeps its meaning, because it decides results."""

    val_part = 0
    initial_weights = 1
    batch_order = 2
    augmentation = 3
    dropout = 4
    bootstrap = 5


def seed_sequence(stream: Stream, *counters: int, seed: int, fold_index: int = 0) -> np.random.SeedSequence:
    """Return the seed of a stream.

    Args:
        stream: What its numbers are for.
        counters: What tells streams of one purpose apart, such as the epoch and the rank of the process.
        seed: The setting `seed`, 0 to 2**32 - 1.
        fold_index: The fold, where a stream belongs to one.
    """
    return np.random.SeedSequence([seed, fold_index], spawn_key=(int(stream), *counters))


def torch_seed(sequence: np.random.SeedSequence) -> int:
    """Return an integer for torch's manual_seed."""
    return int(sequence.generate_state(1, np.uint64)[0])
