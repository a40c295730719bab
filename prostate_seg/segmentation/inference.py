"""From a study to its mask: the one path of validation, evaluation and prediction.

Images are [Z, Y, X]; several networks are an ensemble whose probabilities are averaged before anything else happens to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy import ndimage
from torch import nn

from prostate_seg.config import ModelConfig, Precision
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.preprocessing import PreprocessSettings, preprocess_study, restore_probability
from prostate_seg.segmentation.devices import autocast
from prostate_seg.segmentation.intensity import Intensity, measure_intensity, normalise
from prostate_seg.segmentation.models import is_3d
from prostate_seg.segmentation.windows import neighbours, patch_starts, patches

SLICES_PER_BATCH = 32
"""Slices, of however many inputs, that go through the network at once."""


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
    flips: bool
    """Whether the left-right mirrored study is averaged in."""


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
    prepared = preprocess_study(image, reference, settings=predictor.preprocess).image
    intensity = measure_intensity(prepared.array, clip=predictor.zscore)
    each = predict_each(torch.from_numpy(normalise(prepared.array, intensity=intensity)), predictor=predictor)
    probability = each.mean(dim=0).cpu().numpy()
    restored = restore_probability(probability, window=prepared.geometry, original=image.geometry)
    mask = restored >= threshold
    mask = keep_largest_component(mask) if largest_component else mask
    return Segmentation(
        mask=mask,
        confidence=float(restored[mask].mean()) if mask.any() else None,
        agreement=mean_agreement((each >= threshold).cpu().numpy()),
        intensity=intensity,
        window=prepared.geometry,
    )


def predict_probability(image: torch.Tensor, *, predictor: Predictor) -> np.ndarray:
    """Return the mean probability of gland over networks and mirrors, float32 [Z, Y, X]; arguments as `predict_each`."""
    return predict_each(image, predictor=predictor).mean(dim=0).cpu().numpy()


@torch.inference_mode()
def predict_each(image: torch.Tensor, *, predictor: Predictor) -> torch.Tensor:
    """Return the probability of gland that each network gives, averaged over mirrors.

    Args:
        image: Standardised float32 study on the network's grid, [Z, Y, X].
        predictor: Networks and how to run them.

    Returns:
        float32 tensor [networks, Z, Y, X] on the predictor's device, 0 to 1.
    """
    image = image.to(predictor.device)
    rows = _input_rows(len(image), model=predictor.model)
    total = torch.zeros(len(predictor.networks), *image.shape, device=image.device)
    views = torch.zeros(len(image), 1, 1, device=image.device)
    per_batch = max(1, SLICES_PER_BATCH // rows.shape[1])
    for start in range(0, len(rows), per_batch):
        batch = torch.from_numpy(rows[start : start + per_batch]).to(image.device)
        seen = image[batch]
        slices = batch if is_3d(predictor.model) else batch[:, predictor.model.num_slices // 2, None]
        for number, network in enumerate(predictor.networks):
            probability = _probability(seen, network=network, predictor=predictor)
            total[number].index_add_(0, slices.flatten(), probability.flatten(0, 1))
        views.index_add_(0, slices.flatten(), torch.ones_like(views[:1]).expand(slices.numel(), 1, 1))
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


def _input_rows(num_slices: int, *, model: ModelConfig) -> np.ndarray:
    """Return the slice indices of every input that covers a study."""
    last = num_slices - 1
    if is_3d(model):
        starts = patch_starts(num_slices=num_slices, depth=model.num_slices)
        return patches(starts, depth=model.num_slices, first=0, last=last)
    return neighbours(np.arange(num_slices), num_slices=model.num_slices, first=0, last=last)


def _probability(inputs: torch.Tensor, *, network: nn.Module, predictor: Predictor) -> torch.Tensor:
    """Return [B, D, Y, X] float32 probabilities of inputs [B, slices, Y, X]; D is 1 for a 2-D network."""
    mirrors = (False, True) if predictor.flips else (False,)
    total = torch.zeros(())
    for mirrored in mirrors:
        seen = inputs.flip(-1) if mirrored else inputs
        with autocast(predictor.device, precision=predictor.precision):
            logits = network(seen[:, None])[:, 0] if is_3d(predictor.model) else network(seen)
        probability = torch.sigmoid(logits.float())
        total = total.to(probability.device) + (probability.flip(-1) if mirrored else probability)
    return total / len(mirrors)
