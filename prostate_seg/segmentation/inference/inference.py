"""Inference of one study, the same for validation, evaluation and prediction: networks, test-time augmentation, ensemble, mask.

Images are [Z, Y, X]. An ensemble averages the probabilities of its networks before thresholding. A mask has the same bits for
any number of cores, workers and torch threads; see `network_threads`.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from scipy import ndimage
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional

from prostate_seg.common.errors import InputError
from prostate_seg.common.progress import num_cores
from prostate_seg.imaging.geometry import Geometry, Volume, bounding_box
from prostate_seg.imaging.preprocessing import preprocess_study, restore_probability
from prostate_seg.imaging.regions import label_map_of
from prostate_seg.segmentation.devices import autocast
from prostate_seg.segmentation.inference.expected_dice import mask_features
from prostate_seg.segmentation.inference.network_input import measure_intensity, normalise, patches
from prostate_seg.segmentation.inference.network_threads import network_threads, one_torch_thread
from prostate_seg.segmentation.inference.out_of_distribution import distance_from_training, mean_grey
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.networks import is_3d
from prostate_seg.segmentation.networks.storage import Recipe
from prostate_seg.segmentation.overlap import dice

log = logging.getLogger(__name__)

SLICES_PER_BATCH = {"cpu": 4, "cuda": 32}
"""Slices per forward pass: few on a CPU, so that a single study has batches for all cores."""
WINDOW_OVERLAP = 0.5
"""Fraction of its depth by which the sliding window of a 3-D network overlaps the previous one."""


@dataclass(slots=True)
class BatchLimit:
    """Largest batch size that fits into the memory of a GPU, on which a single thread runs the networks."""

    num_inputs: int | None = None
    """None before the first out-of-memory error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """Trained networks with their preprocessing and inference settings."""

    networks: Sequence[nn.Module]
    """One network, or the ensemble of the folds; in eval mode, on `device`."""
    recipe: Recipe
    """Of all networks; its training ranges include those of each."""
    usage: Usage
    device: torch.device
    num_threads: int = field(default_factory=num_cores)
    """Threads for forward passes on a CPU, shared by all studies."""
    batch_limit: BatchLimit = field(default_factory=BatchLimit)

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Return the threads for forward passes: a single one for a GPU, so that its memory holds one batch."""
        return network_threads(self.num_threads if self.device.type == "cpu" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """Label map of one study with its uncertainty measures, which are those of the gland."""

    label_map: np.ndarray
    """On the study's own grid, [Z, Y, X], as `regions.label_map_of` returns it; every label above 0 is gland."""
    probability: np.ndarray
    """Of each region on the same grid, float32 [regions, Z, Y, X]."""
    confidence: float | None
    """Mean probability over the gland's voxels; None for an empty mask."""
    inter_model_dice: float | None
    """Of the networks' glands on the preprocessed grid; None for one network, or if all masks are empty."""
    properties: dict[str, float]
    """Properties of the study that have training ranges; an empty mask has no volume."""
    features: dict[str, float]
    """Features of `expected_dice`; empty for an empty mask, or if they were not asked for."""
    window: Geometry


def segment(
    image: Volume, reference: Volume | None, *, predictor: Predictor, with_features: bool = True
) -> Segmentation:
    """Segment a study on its own grid.

    The reference only centres the window of crop "mask". Voxels with a probability from the threshold on are gland, all of them
    or only the largest connected component; each gets the most probable of the gland's labels. Without features, the study has
    no expected Dice.
    """
    recipe, threshold = predictor.recipe, predictor.usage.threshold
    reference = reference if recipe.preprocess.crop == "mask" else None
    with threadpool_limits(1, user_api="blas"):  # the rounding of sums in resampling depends on the number of threads
        prepared = preprocess_study(image, reference, settings=recipe.preprocess).image
        intensity = measure_intensity(prepared.array, clip=recipe.zscore)
        standardised = torch.from_numpy(normalise(prepared.array, intensity=intensity))
        per_network, plain = network_probabilities(standardised, predictor=predictor)
        restore = partial(restore_probability, window=prepared.geometry, original=image.geometry)
        probability = np.stack([restore(one) for one in per_network.mean(axis=0)])
    gland = probability[0] >= threshold
    gland = keep_largest_component(gland) if predictor.usage.largest_component else gland
    agreement = inter_model_dice(per_network[:, 0] >= threshold)
    properties = _properties(image, gland, mean_grey=mean_grey(intensity))
    features: dict[str, float] = {}
    if with_features and gland.any():
        spacing_mm = prepared.geometry.spacing_mm
        measure = partial(mask_features, threshold=threshold, inter_model_dice=agreement, spacing_mm=spacing_mm)
        features = measure(per_network[:, 0], plain)
        features["outside_training"] = distance_from_training(properties, ranges=recipe.ranges)
    return Segmentation(
        label_map=label_map_of(gland, probability, recipe.preprocess.regions),
        probability=probability,
        confidence=float(probability[0][gland].mean()) if gland.any() else None,
        inter_model_dice=agreement,
        properties=properties,
        features=features,
        window=prepared.geometry,
    )


def _properties(image: Volume, gland: np.ndarray, **measured: float) -> dict[str, float]:
    z_mm, y_mm, _ = image.geometry.spacing_mm
    found = {"spacing_y_mm": y_mm, "spacing_z_mm": z_mm, "num_slices": float(len(image.array)), **measured}
    if gland.any():
        found["gland_volume_ml"] = np.count_nonzero(gland) * image.geometry.voxel_volume_ml
    return found


def predict_probability(image: torch.Tensor, *, predictor: Predictor) -> np.ndarray:
    """Return the mean probability over all networks, float32 [regions, Z, Y, X]; arguments as `network_probabilities`."""
    return network_probabilities(image, predictor=predictor)[0].mean(axis=0)


@torch.inference_mode()
def network_probabilities(image: torch.Tensor, *, predictor: Predictor) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the probability of each region from each network, averaged over TTA and windows.

    `image` is the standardised study on the preprocessed grid, float32 [Z, Y, X]. The result is float32
    [networks, regions, Z, Y, X] and, with TTA, the probability of the gland without TTA, [networks, Z, Y, X].
    """
    forward = partial(_forward, predictor=predictor, pool=predictor.pool)
    image = image.to(predictor.device)  # in this thread, because the current GPU is a property of each thread
    num_slices, depth = len(image), predictor.recipe.model.num_slices
    with one_torch_thread():
        if is_3d(predictor.recipe.model):
            # A study shorter than the window is padded with its last slice as in training, and the padding is cropped off.
            # MONAI's own padding is symmetric. All windows go to `forward` at once, which batches them for the threads.
            padding = (0, 0, 0, 0, 0, max(0, depth - num_slices))
            probability = sliding_window_inference(
                functional.pad(image[None, None], padding, mode="replicate"),
                roi_size=(depth, *image.shape[1:]),
                sw_batch_size=num_slices,
                predictor=forward,
                overlap=WINDOW_OVERLAP,
            )[0, :, :num_slices]
        else:
            centers = torch.arange(num_slices, device=image.device)
            rows = patches(centers - depth // 2, depth=depth, first=0, last=num_slices - 1)
            probability = forward(image[rows]).transpose(0, 1)
        array: np.ndarray = probability.unflatten(0, (len(predictor.networks), -1)).contiguous().cpu().numpy()
    return (array[:, :-1], array[:, -1]) if predictor.usage.tta else (array, None)


def _forward(inputs: torch.Tensor, *, predictor: Predictor, pool: ThreadPoolExecutor) -> torch.Tensor:
    """Return probabilities [N, networks * channels, (D,) Y, X] of inputs [N, slices, Y, X] or [N, 1, D, Y, X].

    The channels are those of `_probability`.
    """
    # Batches have a fixed size: the last bits of a convolution depend on the size of its batch.
    depth = inputs.shape[2] if is_3d(predictor.recipe.model) else 1
    batch_size = max(1, SLICES_PER_BATCH[inputs.device.type] // depth)
    batches = inputs.split(batch_size)
    futures = [
        [pool.submit(_forward_batch, batch, network=network, predictor=predictor) for batch in batches]
        for network in predictor.networks
    ]
    return torch.cat([torch.cat([future.result() for future in row]) for row in futures], dim=1)


def _forward_batch(inputs: torch.Tensor, *, network: nn.Module, predictor: Predictor) -> torch.Tensor:
    """Return probabilities of a batch, in smaller batches from here on if a GPU runs out of memory.

    Raises:
        InputError: If a single input does not fit.
    """
    limit = predictor.batch_limit
    while True:
        size = min(limit.num_inputs or len(inputs), len(inputs))
        try:
            parts = [_probability(part, network=network, predictor=predictor) for part in inputs.split(size)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        except torch.OutOfMemoryError as error:
            reason = str(error)  # the error itself references the tensors of the batch until this block ends
        if inputs.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise InputError(
                f"one input does not fit into the memory of the GPU: {reason}\n"
                "Use machine.device=cpu, or a network with a lower preprocess.image_size or fewer model.channels."
            )
        limit.num_inputs = (size + 1) // 2
        log.warning("the GPU is out of memory: the batch size of inference is %d from here on", limit.num_inputs)


@torch.inference_mode()
def _probability(inputs: torch.Tensor, *, network: nn.Module, predictor: Predictor) -> torch.Tensor:
    """Return float32 probabilities of the regions; with TTA their mean with those of the mirrored inputs.

    With TTA one more channel has the probability of the gland from the inputs as they are.
    """
    views = []
    for mirrored in (False, True) if predictor.usage.tta else (False,):
        with autocast(inputs.device, precision=predictor.usage.precision):
            logits = network(inputs.flip(-1) if mirrored else inputs)
        probability = torch.sigmoid(logits.float())
        views.append(probability.flip(-1) if mirrored else probability)
    mean = torch.stack(views).mean(dim=0)
    return torch.cat([mean, views[0][:, :1]], dim=1) if predictor.usage.tta else mean


def inter_model_dice(masks: np.ndarray) -> float | None:
    """Return the mean pairwise Dice of masks, bool [masks, Z, Y, X]; None for fewer than two, or if all are empty."""
    if len(masks) < 2 or not masks.any():
        return None
    return float(np.mean([dice(one, other) for one, other in combinations(masks, 2)]))


def keep_largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the largest face-connected component of a bool mask [Z, Y, X]."""
    box = bounding_box(mask)
    labels, num_components = ndimage.label(mask[box])
    if num_components < 2:
        return mask
    kept = np.zeros_like(mask)
    kept[box] = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    return kept
