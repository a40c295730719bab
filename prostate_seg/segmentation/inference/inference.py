"""From a study to its mask: the one path of validation, evaluation and prediction.

Images are [Z, Y, X]; several networks are an ensemble whose probabilities are averaged before anything else happens to them.
A mask has the same bits whatever the number of cores, workers and torch threads: see `network_threads`.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
import torch
from scipy import ndimage
from threadpoolctl import threadpool_limits
from torch import nn

from prostate_seg.common.errors import InputError
from prostate_seg.common.progress import num_cores
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.preprocessing import PreprocessSettings, preprocess_study, restore_probability
from prostate_seg.segmentation.devices import autocast
from prostate_seg.segmentation.inference.intensity import Intensity, measure_intensity, normalise
from prostate_seg.segmentation.inference.network_threads import network_threads
from prostate_seg.segmentation.inference.windows import neighbours, patch_starts, patches
from prostate_seg.segmentation.networks.networks import is_3d
from prostate_seg.segmentation.networks.settings import ModelConfig
from prostate_seg.segmentation.settings import Precision

log = logging.getLogger(__name__)

SLICES_PER_BATCH = {"cpu": 4, "cuda": 32}
"""Slices that go through a network at once: few on a CPU, so that a single study has batches for all cores."""


class BatchLimit:
    """The largest number of inputs that go through a network at once; it falls when a GPU is out of memory."""

    def __init__(self) -> None:
        self.num_inputs: int | None = None
        """None until memory has run out."""
        self._lock = threading.Lock()

    def halve(self, num_inputs: int, reason: str) -> None:
        """Allow half of the inputs that did not fit.

        Raises:
            InputError: If a single input does not fit.
        """
        if num_inputs == 1:
            raise InputError(
                f"one input does not fit into the memory of the GPU: {reason}\n"
                "Use machine.device=cpu, or a network with a lower preprocess.image_size or fewer model.channels."
            )
        half = (num_inputs + 1) // 2
        with self._lock:
            if self.num_inputs is not None and self.num_inputs <= half:
                return
            self.num_inputs = half
        log.warning("the GPU is out of memory: inputs go through the networks %d at a time from here on", half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """Trained networks and what they expect."""

    networks: Sequence[nn.Module]
    """One, or the ensemble of the folds; in eval mode, on `device`."""
    model: ModelConfig
    """Architecture of all of them."""
    preprocess: PreprocessSettings
    """What a study must go through first."""
    zscore: bool
    """Whether intensities are clipped before they are standardised."""
    device: torch.device
    precision: Precision
    tta: bool
    """Whether the left-right mirrored study is averaged in."""
    num_threads: int = field(default_factory=num_cores)
    """Threads that run the networks on a CPU, over all studies."""
    batch_limit: BatchLimit = field(default_factory=BatchLimit)

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Return the threads that run the networks: for a GPU a single one, so that its memory holds one batch."""
        return network_threads(self.num_threads if self.device.type == "cpu" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """What the networks make of a study."""

    mask: np.ndarray
    """Gland, bool on the study's own grid, [Z, Y, X]."""
    confidence: float | None
    """Mean probability of the mask's voxels; None of an empty mask."""
    agreement: float | None
    """Mean Dice of the masks of each two networks on their grid; None of one network, or where none sees a gland."""
    intensity: Intensity
    """Of what the networks have seen."""
    window: Geometry
    """Grid that the networks have seen."""


def segment(
    image: Volume, reference: Volume | None, *, predictor: Predictor, threshold: float, largest_component: bool
) -> Segmentation:
    """Segment a study as scanned.

    Args:
        image: The study on its own grid.
        reference: Its reference mask, used for nothing but the centre of crop "mask"; None otherwise.
        predictor: Networks and their preprocessing.
        threshold: Probability from which a voxel is gland.
        largest_component: Whether only the largest connected region is kept.
    """
    with threadpool_limits(1, user_api="blas"):  # another number may round sums of the resampling in another way
        prepared = preprocess_study(image, reference, settings=predictor.preprocess).image
        intensity = measure_intensity(prepared.array, clip=predictor.zscore)
        each = predict_each(torch.from_numpy(normalise(prepared.array, intensity=intensity)), predictor=predictor)
        restored = restore_probability(each.mean(axis=0), window=prepared.geometry, original=image.geometry)
    mask = restored >= threshold
    mask = keep_largest_component(mask) if largest_component else mask
    return Segmentation(
        mask=mask,
        confidence=float(restored[mask].mean()) if mask.any() else None,
        agreement=mean_agreement(each >= threshold),
        intensity=intensity,
        window=prepared.geometry,
    )


def predict_probability(image: torch.Tensor, *, predictor: Predictor) -> np.ndarray:
    """Return the mean probability of gland over networks and mirrors, float32 [Z, Y, X]; arguments as `predict_each`."""
    return predict_each(image, predictor=predictor).mean(axis=0)


def predict_each(image: torch.Tensor, *, predictor: Predictor) -> np.ndarray:
    """Return the probability of gland that each network gives, averaged over mirrors and overlapping patches.

    Args:
        image: Standardised float32 study on the network's grid, [Z, Y, X].
        predictor: Networks and how to run them.

    Returns:
        float32 array [networks, Z, Y, X], 0 to 1.
    """
    image = image.to(predictor.device)  # here, as the current GPU is a thread's own
    rows, starts = _inputs(len(image), model=predictor.model)
    depth = predictor.model.num_slices if is_3d(predictor.model) else 1
    size = max(1, SLICES_PER_BATCH[image.device.type] // depth)
    batches = [slice(start, start + size) for start in range(0, len(rows), size)]
    run = partial(_run_batch, image, predictor=predictor)
    running = [
        [predictor.pool.submit(run, rows[batch], network) for batch in batches] for network in predictor.networks
    ]
    total = np.zeros((len(predictor.networks), *image.shape), dtype=np.float32)
    views = np.zeros((len(image), 1, 1), dtype=np.float32)
    for start in starts:
        views[start : start + depth] += 1
    for number, futures in enumerate(running):
        for batch, future in zip(batches, futures, strict=True):
            for start, probability in zip(starts[batch], future.result(), strict=True):
                covered = total[
                    number, start : start + depth
                ]  # of a patch that is deeper than the study, the study alone
                covered += probability[: len(covered)]
    return total / views


def mean_agreement(masks: np.ndarray) -> float | None:
    """Return the mean Dice of each two of some masks, bool [masks, Z, Y, X]; None of fewer than two, or all empty."""
    if len(masks) < 2 or not masks.any():
        return None
    flat = masks.reshape(len(masks), -1)
    sizes = flat.sum(axis=1)
    pairs = [
        2 * int((flat[one] & flat[other]).sum()) / int(sizes[one] + sizes[other]) if sizes[one] + sizes[other] else 1.0
        for one, other in combinations(range(len(flat)), 2)
    ]
    return float(np.mean(pairs))


def keep_largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the mask, [Z, Y, X] bool, without all but its largest face-connected region."""
    box = next(iter(ndimage.find_objects(mask.astype(np.uint8))), None)
    if box is None:
        return mask
    labels, number = ndimage.label(mask[box])
    if number == 1:
        return mask
    kept = np.zeros_like(mask)
    kept[box] = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    return kept


def _inputs(num_slices: int, *, model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the slice indices of every input that covers a study, [N, slices], and the first slice that each predicts."""
    last = num_slices - 1
    if is_3d(model):
        starts = patch_starts(num_slices=num_slices, depth=model.num_slices)
        return patches(starts, depth=model.num_slices, first=0, last=last), starts
    centers = np.arange(num_slices)
    return neighbours(centers, num_slices=model.num_slices, first=0, last=last), centers


def _run_batch(image: torch.Tensor, rows: np.ndarray, network: nn.Module, *, predictor: Predictor) -> np.ndarray:
    """Return float32 probabilities [N, D, Y, X] of the inputs that consist of some slices, [N, slices]."""
    while True:
        size = min(predictor.batch_limit.num_inputs or len(rows), len(rows))
        try:
            parts = [
                _probability(image[torch.from_numpy(rows[start : start + size])], network=network, predictor=predictor)
                for start in range(0, len(rows), size)
            ]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        except torch.OutOfMemoryError as error:
            reason = str(error)  # the error itself holds the tensors of the batch, and ends with this block
        if image.device.type == "cuda":
            torch.cuda.empty_cache()
        predictor.batch_limit.halve(size, reason)


@torch.inference_mode()
def _probability(inputs: torch.Tensor, *, network: nn.Module, predictor: Predictor) -> np.ndarray:
    """Return [N, D, Y, X] float32 probabilities of inputs [N, slices, Y, X]; D is 1 for a 2-D network."""
    mirrors = (False, True) if predictor.tta else (False,)
    views = []
    for mirrored in mirrors:
        seen = inputs.flip(-1) if mirrored else inputs
        with autocast(inputs.device, precision=predictor.precision):
            logits = network(seen[:, None])[:, 0] if is_3d(predictor.model) else network(seen)
        probability = torch.sigmoid(logits.float())
        views.append(probability.flip(-1) if mirrored else probability)
    mean: np.ndarray = torch.stack(views).mean(dim=0).cpu().numpy()
    return mean
