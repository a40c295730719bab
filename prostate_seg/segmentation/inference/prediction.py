"""Prediction for a study without a reference: mask, volume, uncertainty, and warnings that call for review."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.preprocessing import axis_index
from prostate_seg.imaging.quality import PLAUSIBLE_VOLUME_ML, check_case
from prostate_seg.imaging.regions import region_masks
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.segmentation.inference.expected_dice import Estimate
from prostate_seg.segmentation.inference.inference import segment
from prostate_seg.segmentation.inference.out_of_distribution import out_of_distribution
from prostate_seg.segmentation.networks.model_folder import Model

LOW_CONFIDENCE = 0.8
"""A lower mean probability over the mask's voxels is a warning."""
LOW_INTER_MODEL_DICE = 0.85
"""A lower inter-model Dice is a warning: human readers reach 0.92 (Insights Imaging 2021, 12:71)."""
MAX_LABELS = 10
"""An image of integers with no more distinct values than this is refused as a label map."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A label map with its volumes, uncertainty and warnings."""

    mask: Volume
    """Label map on the study's own grid: the gland alone is 0 or 1, zones have the labels of the networks' data set."""
    volume_ml: float
    """Volume of the gland."""
    zones: dict[str, dict[str, Any]]
    """Labels and volume_ml of each zone, by name, as records have them; empty for networks of the gland alone."""
    num_slices: int
    """Slices with gland."""
    mean_confidence: float | None
    """Mean probability over the mask's voxels; None for an empty mask."""
    inter_model_dice: float | None
    """Mean pairwise Dice of the networks' masks; None for one network, or if all masks are empty."""
    estimate: Estimate | None
    """Expected Dice and its lower bound; None for a model that has no calibration for them."""
    warnings: list[str]
    """Reasons to review the mask, as sentences."""


def predict(image: Volume, *, model: Model) -> Prediction:
    """Segment a study on its own grid.

    Raises:
        InputError: If the image has too few slices, no intensity range or values that are not finite, or is a label map.
    """
    findings = check_case("", image, None, labels=None).findings
    for finding in findings:
        if finding.is_error:
            raise VolumeError(finding.message, finding.check)
    _require_no_label_map(image.array)
    found = segment(image, None, predictor=model.predictor)
    gland, voxel_ml = found.label_map > 0, image.geometry.voxel_volume_ml
    volume_ml = int(gland.sum()) * voxel_ml
    warnings = [
        *model.notes,
        *(finding.message for finding in findings),
        *out_of_distribution(found.properties, ranges=model.predictor.recipe.ranges),
        *_mask_warnings(gland, image.geometry, found.window, volume_ml=volume_ml),
    ]
    masks = dict(zip(model.regions, region_masks(found.label_map, model.regions), strict=True))
    if gland.any():
        warnings += [f"no {name.replace('_', ' ')} was found" for name, mask in masks.items() if not mask.any()]
    zones = {
        name: {"labels": list(labels or ()), "volume_ml": round(int(masks[name].sum()) * voxel_ml, 3)}
        for name, labels in model.regions.items()
        if name != WHOLE_GLAND
    }
    if found.confidence is not None and found.confidence < LOW_CONFIDENCE:
        warnings.append(f"mean probability {found.confidence:.2f}, below {LOW_CONFIDENCE:g}")
    if found.inter_model_dice is not None and found.inter_model_dice < LOW_INTER_MODEL_DICE:
        warnings.append(f"inter-model Dice {found.inter_model_dice:.2f}, below {LOW_INTER_MODEL_DICE:g}")
    calibration = model.expected_dice
    return Prediction(
        mask=image.with_mask(found.label_map),
        volume_ml=volume_ml,
        zones=zones,
        num_slices=int(gland.any(axis=(1, 2)).sum()),
        mean_confidence=found.confidence,
        inter_model_dice=found.inter_model_dice,
        estimate=calibration.estimate(found.features) if calibration else None,
        warnings=warnings,
    )


def _require_no_label_map(array: np.ndarray) -> None:
    if len(np.unique(array[::4, ::4, ::4])) > MAX_LABELS:  # true of nearly every image, and much faster on a subsample
        return
    values = np.unique(array)
    if len(values) <= MAX_LABELS and (values == np.rint(values)).all():
        listing = ", ".join(f"{value:g}" for value in values)
        raise VolumeError(
            f"an image has many grey values, and this one has only {listing}: it looks like a mask; give the image",
            "looks_like_mask",
        )


def _mask_warnings(mask: np.ndarray, grid: Geometry, window: Geometry, *, volume_ml: float) -> list[str]:
    """Return warnings about an empty, implausible or truncated mask."""
    if not mask.any():
        return ["no gland was found"]
    warnings = []
    low, high = PLAUSIBLE_VOLUME_ML
    if not low <= volume_ml <= high:
        warnings.append(f"gland of {volume_ml:.1f} mL, among 1,500 patients {low:g} to {high:g}")
    if mask[0].any() or mask[-1].any():
        warnings.append("gland in the first or last slice: it may be cut off")
    _, y, x = axis_index(grid, window)
    for axis, index in ((1, y), (2, x)):
        inside = np.flatnonzero(mask.any(axis=(0, 3 - axis)))[[0, -1]]
        at_window = index[inside[0]] < 1 or index[inside[1]] > window.shape_vox[axis] - 2
        if at_window or inside[0] == 0 or inside[1] == mask.shape[axis] - 1:
            warnings.append("gland at the edge of the image or of the networks' window: it may be cut off")
            break
    return warnings
