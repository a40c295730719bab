"""Independent random streams from one seed.

Each use of randomness has its own stream: NumPy's SeedSequence of seed and fold, with purpose and counters as spawn key. Seeds
are never added, because seed 1 with fold 1 would then equal seed 2 with fold 0.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Purpose of a stream; the numbers decide results and never change."""

    val_subset = 0
    initial_weights = 1
    batch_order = 2
    augmentation = 3
    dropout = 4
    bootstrap = 5
    test_subset = 6
    train_subset = 7
    perturbation = 8


def seed_sequence(stream: Stream, *counters: int, seed: int, fold_index: int = 0) -> np.random.SeedSequence:
    """Return the seed of a stream.

    Args:
        stream: Purpose.
        counters: Distinguish streams of one purpose, such as the epoch and the rank of the process.
        seed: The setting `seed`, 0 to 2**32 - 1.
        fold_index: Fold of the stream, if it has one.
    """
    return np.random.SeedSequence([seed, fold_index], spawn_key=(int(stream), *counters))


def integer_seed(sequence: np.random.SeedSequence) -> int:
    """Return an integer for scikit-learn's random_state, 0 to 2**32 - 1."""
    return int(sequence.generate_state(1)[0])


def torch_seed(sequence: np.random.SeedSequence) -> int:
    """Return an integer for torch's manual_seed."""
    return int(sequence.generate_state(1, np.uint64)[0])
