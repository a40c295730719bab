"""Choice of the number format of training on a GPU: `auto` is what is faster for this network on this card."""

import logging
import time
from collections.abc import Callable

import torch

from prostate_seg.segmentation.devices import computes_bf16
from prostate_seg.segmentation.settings import Precision
from prostate_seg.segmentation.training.cuda_graph import NUM_STEPS_BEFORE, Step

log = logging.getLogger(__name__)

NUM_TIMED_STEPS = 20
MAX_BF16_TIME = 0.95
"""Time of a bfloat16 step relative to a float32 step below which bfloat16 is used; equal steps are float32 in every run."""


def faster_precision(step_in: Callable[[Precision], Step], slices: torch.Tensor) -> Precision:
    """Return the precision whose steps are faster, and log both times.

    Args:
        step_in: Returns a step of a network that is not trained, in a precision.
        slices: Slices of a batch, on the device.
    """
    if not computes_bf16(slices.device):
        return "fp32"
    fp32, bf16 = (_seconds(step_in(precision), slices) for precision in ("fp32", "bf16"))
    faster: Precision = "bf16" if bf16 < MAX_BF16_TIME * fp32 else "fp32"
    log.info(
        "train.precision=auto is %s here: a step takes %.2f ms in fp32, %.2f ms in bf16",
        faster,
        1000 * fp32,
        1000 * bf16,
    )
    return faster


def _seconds(step: Step, slices: torch.Tensor) -> float:
    """Return the mean seconds of a step, after those that precede its capture and its first replays."""
    for _ in range(NUM_STEPS_BEFORE + 3):
        step(slices).item()  # waits for the device
    start = time.perf_counter()
    for _ in range(NUM_TIMED_STEPS):
        loss = step(slices)
    loss.item()
    return (time.perf_counter() - start) / NUM_TIMED_STEPS
