"""What is said of a study that nobody has segmented before: its mask, its volume, and how far both are to be trusted."""

from dataclasses import dataclass

import numpy as np

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.preprocessing import axis_index
from prostate_seg.imaging.quality import PLAUSIBLE_VOLUME_ML, check_case
from prostate_seg.segmentation.inference.inference import segment
from prostate_seg.segmentation.inference.out_of_distribution import mean_grey, unfamiliar
from prostate_seg.segmentation.networks.model_folder import Model

LOW_CONFIDENCE = 0.8
"""A mask whose voxels have a lower mean probability is worth a look."""

LOW_AGREEMENT = 0.85
"""Networks whose masks overlap less are worth a look: human readers reach 0.92 (Insights Imaging 2021, 12:71)."""

MAX_LABELS = 10
"""An image of no more whole numbers than these is a mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A mask and what is known of it."""

    mask: Volume
    """Gland, uint8 0 or 1, on the study's own grid."""
    volume_ml: float
    num_slices: int
    """Slices with gland."""
    mean_confidence: float | None
    """Mean probability of the mask's voxels; None of an empty mask."""
    fold_agreement: float | None
    """Mean Dice of the masks of each two networks; None of one network."""
    warnings: list[str]
    """Why the mask is worth a look, in sentences."""


def predict(image: Volume, *, model: Model) -> Prediction:
    """Segment a study as scanned.

    Args:
        image: The study on its own grid.
        model: Networks and how to use them.

    Raises:
        InputError: If the image has too few slices, no intensity range or values that are not finite, or is a mask.
    """
    findings = check_case("", image, None, labels=None).findings
    errors = [finding for finding in findings if finding.is_error]
    if errors:
        raise VolumeError(errors[0].message, errors[0].check)
    _require_no_mask(image.array)
    found = segment(
        image,
        None,
        predictor=model.predictor,
        threshold=model.usage.threshold,
        largest_component=model.usage.largest_component,
    )
    volume_ml = int(found.mask.sum()) * image.geometry.voxel_volume_ml
    spacing_z_mm, spacing_y_mm, _ = image.geometry.spacing_mm
    study = {
        "spacing_y_mm": spacing_y_mm,
        "spacing_z_mm": spacing_z_mm,
        "num_slices": float(len(image.array)),
        "mean_grey": mean_grey(found.intensity),
        **({"gland_volume_ml": volume_ml} if volume_ml else {}),
    }
    return Prediction(
        mask=image.with_mask(found.mask),
        volume_ml=volume_ml,
        num_slices=int(found.mask.any(axis=(1, 2)).sum()),
        mean_confidence=found.confidence,
        fold_agreement=found.agreement,
        warnings=[
            *model.notes,
            *(finding.message for finding in findings),
            *unfamiliar(study, ranges=model.ranges),
            *_doubts(found.mask, image.geometry, found.window, volume_ml=volume_ml),
            *_low("mean probability", found.confidence, LOW_CONFIDENCE),
            *_low("agreement between folds", found.agreement, LOW_AGREEMENT),
        ],
    )


def _require_no_mask(array: np.ndarray) -> None:
    """Refuse an image of a few whole numbers."""
    if len(np.unique(array[::4, ::4, ::4])) > MAX_LABELS:  # nearly every image, seen in a part of the time
        return
    values = np.unique(array)
    if len(values) <= MAX_LABELS and (values == np.rint(values)).all():
        listing = ", ".join(f"{value:g}" for value in values)
        raise VolumeError(
            f"an image has many grey values, and this one has only {listing}: it looks like a mask; give the image",
            "looks_like_mask",
        )


def _doubts(mask: np.ndarray, grid: Geometry, window: Geometry, *, volume_ml: float) -> list[str]:
    """Return what a mask itself says against it."""
    if not mask.any():
        return ["no gland was found"]
    doubts = []
    low, high = PLAUSIBLE_VOLUME_ML
    if not low <= volume_ml <= high:
        doubts.append(f"gland of {volume_ml:.1f} mL, among 1,500 patients {low:g} to {high:g}")
    if mask[0].any() or mask[-1].any():
        doubts.append("gland in the first or last slice: it may be cut off")
    _, y, x = axis_index(grid, window)
    for axis, index in ((1, y), (2, x)):
        inside = np.flatnonzero(mask.any(axis=(0, 3 - axis)))[[0, -1]]
        at_window = index[inside[0]] < 1 or index[inside[1]] > window.shape_vox[axis] - 2
        if at_window or inside[0] == 0 or inside[1] == mask.shape[axis] - 1:
            doubts.append("gland at the edge of the image or of the networks' window: it may be cut off")
            break
    return doubts


def _low(name: str, value: float | None, least: float) -> list[str]:
    return [] if value is None or value >= least else [f"{name} {value:.2f}, below {least:g}"]
