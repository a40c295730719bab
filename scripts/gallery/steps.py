"""Pictures of each preprocessing step and of each augmentation, by the functions that the stages call."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
import yaml
from torch.nn import functional

from prostate_seg.cli import config_folder
from prostate_seg.common.settings import parse_group
from prostate_seg.imaging.preprocessing import Preprocessed, PreprocessSettings, preprocess_study, restore_probability
from prostate_seg.phantom.studies import PhantomCase
from prostate_seg.segmentation.inference.network_input import measure_intensity, normalise
from prostate_seg.segmentation.training import augmentation
from prostate_seg.segmentation.training.augmentation import INTENSITIES, augment
from prostate_seg.segmentation.training.settings import Augmentation
from scripts.gallery.drawing import Panel, write_panels

NUM_EXAMPLES = 3
"""Random draws of each transform, beside the input."""
NUM_DRAWS = 64
"""Draws of a spatial transform from which those without mirroring are taken."""
NEUTRAL = {"ROTATION_DEGREES": 0.0, "SCALE_RANGE": (1.0, 1.0), "SHIFT_FRACTION": 0.0, "DEFORMATION_PROBABILITY": 0.0}
"""Ranges in which a spatial transform does nothing."""
SPATIAL = {
    "rotation": {"ROTATION_DEGREES": augmentation.ROTATION_DEGREES},
    "scale": {"SCALE_RANGE": augmentation.SCALE_RANGE},
    "shift": {"SHIFT_FRACTION": augmentation.SHIFT_FRACTION},
    "deformation": {"DEFORMATION_PROBABILITY": 1.0},
}
OFF = {"contrast_range": (1.0, 1.0), "brightness_sd": 0.0, "bias_sd": 0.0, "probability": 1.0}
"""Intensities without contrast, brightness and bias field."""


def default_settings(**changes: Any) -> PreprocessSettings:
    """Return the settings of configs/preprocess/default.yaml with changes."""
    values = yaml.safe_load((config_folder() / "preprocess" / "default.yaml").read_text(encoding="utf-8"))
    return parse_group(PreprocessSettings, values | {"whole_gland_labels": None, "zones": {}} | changes)


# --- preprocessing --------------------------------------------------------------------------------------------------


def preprocess(case: PhantomCase, **changes: Any) -> Preprocessed:
    """Preprocess a phantom with the default settings and some changes."""
    return preprocess_study(case.image, case.mask, settings=default_settings(**changes))


def draw_resampling(path: Path, case: PhantomCase) -> None:
    """Draw part of a slice at several pixel spacings."""
    panels = []
    for title, spacing_mm in (
        ("stored", None),
        ("0.5 mm", (3.0, 0.5, 0.5)),
        ("0.8 mm (default)", (3.0, 0.8, 0.8)),
        ("2 mm", (3.0, 2.0, 2.0)),
    ):
        pixel_mm = case.image.geometry.spacing_mm[1] if spacing_mm is None else spacing_mm[1]
        done = preprocess(case, spacing_mm=spacing_mm, image_size=max(32, round(64 / pixel_mm)), crop="mask")
        panels.append(_panel(f"{title}" if spacing_mm else f"stored, {pixel_mm:.2g} mm", done))
    write_panels(path, panels)


def draw_window(path: Path, case: PhantomCase) -> None:
    """Draw the window of each setting of the crop on the study, and what it keeps."""
    stored, index = case.image, _index(case.mask.array)
    panels = []
    for title, changes in (
        ("center, 128", {}),
        ("center, 80", {"image_size": 80}),
        ("mask, 80", {"image_size": 80, "crop": "mask"}),
    ):
        done = preprocess(case, **changes)
        _, top, left = stored.geometry.to_index(done.image.geometry.to_world((0.0, 0.0, 0.0)))
        edge = changes.get("image_size", 128) * 0.8 / stored.geometry.spacing_mm[1]
        panels.append(
            Panel(
                title=title,
                pixels=stored.array[index].astype(float),
                labels=(case.mask.array[index] > 0).astype(int),
                square_vox=(top, left, edge, edge),
            )
        )
        panels.append(_panel(f"kept: {done.gland_kept_fraction:.0%} of the gland", done))
    write_panels(path, panels, num_columns=2)


def draw_percentiles(path: Path, case: PhantomCase) -> None:
    """Draw 8-bit slices with the percentiles of the setting, of a study with a few very bright voxels."""
    array = case.image.array.copy()
    index = _index(case.mask.array)
    top, left = (size // 2 - 70 for size in array.shape[1:])
    array[index, top : top + 9, left : left + 9] = 2 * array.max()
    bright = replace(case, image=replace(case.image, array=array))
    panels = [
        replace(_panel(title, preprocess(bright, intensity_percentiles=bounds)), limits=(0, 255))
        for title, bounds in (("0, 100", (0, 100)), ("0.5, 99.5 (default)", (0.5, 99.5)), ("5, 95", (5, 95)))
    ]
    write_panels(path, panels)


def draw_zscore(path: Path, cases: Sequence[PhantomCase]) -> None:
    """Draw two studies of different scanners on one grey scale: as kept, normalised, and normalised after clipping."""
    panels = []
    for number, case in enumerate(cases):
        done = preprocess(case, to_8bit=False)
        array, index = done.image.array, _index(case.mask.array)
        shown = [
            ("intensities", array, (0.0, 900.0)),
            ("mean 0, SD 1", normalise(array, intensity=measure_intensity(array, clip=False)), (-2.0, 3.0)),
            ("train.zscore", normalise(array, intensity=measure_intensity(array, clip=True)), (-2.0, 3.0)),
        ]
        panels += [
            Panel(title=f"{'AB'[number]}: {title}", pixels=pixels[index], limits=limits)
            for title, pixels, limits in shown
        ]
    write_panels(path, panels, num_columns=3)


def draw_regions(path: Path, case: PhantomCase) -> None:
    """Draw the labels of a mask and the regions that the network learns from them."""
    index = _index(case.mask.array)
    zones = preprocess(case, zones={"transition_zone": (1,), "peripheral_zone": (2,)})
    assert zones.mask is not None
    bits, pixels = zones.mask.array[index], zones.image.array[index].astype(float)
    shown = [("whole gland", bits & 1), ("transition zone", (bits >> 2) & 1), ("peripheral zone", (bits >> 1) & 1)]
    rows, columns = _around(case.mask.array)
    labels = Panel(
        title="labels of the file",
        pixels=case.image.array[index][rows, columns].astype(float),
        labels=case.mask.array[index][rows, columns],
    )
    write_panels(path, [labels, *(Panel(title=title, pixels=pixels, labels=region) for title, region in shown)])


def draw_restoring(path: Path, case: PhantomCase) -> None:
    """Draw a mask on the network's grid and, by way of probabilities, on the study's own grid again."""
    done, index = preprocess(case, spacing_mm=(3.0, 2.0, 2.0), image_size=38, crop="mask"), _index(case.mask.array)
    assert done.mask is not None
    probability = restore_probability(
        done.mask.array.astype(np.float32), window=done.image.geometry, original=case.image.geometry
    )
    rows, columns = _around(case.mask.array)
    write_panels(
        path,
        [
            _panel("network's grid, 2 mm", done),
            Panel(title="probability", pixels=probability[index][rows, columns], limits=(0, 1)),
            Panel(
                title="mask, own grid",
                pixels=case.image.array[index][rows, columns].astype(float),
                labels=(probability[index][rows, columns] > 0.5).astype(int),
            ),
        ],
    )


def _around(labels: np.ndarray) -> tuple[slice, slice]:
    middle = np.argwhere(labels).mean(axis=0).astype(int)
    return slice(max(0, middle[1] - 80), middle[1] + 80), slice(max(0, middle[2] - 80), middle[2] + 80)


def _panel(title: str, done: Preprocessed) -> Panel:
    assert done.mask is not None
    index = len(done.mask.array) // 2 if not done.mask.array.any() else _index(done.mask.array)
    return Panel(title=title, pixels=done.image.array[index].astype(float), labels=done.mask.array[index])


def _index(labels: np.ndarray) -> int:
    """Return the slice with the largest marked area."""
    return int((labels > 0).sum(axis=(1, 2)).argmax())


# --- augmentation ---------------------------------------------------------------------------------------------------


def training_slice(case: PhantomCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image and mask of a slice as training has them, [1, 1, Y, X]."""
    done = preprocess(case)
    assert done.mask is not None
    index = _index(done.mask.array)
    image = normalise(done.image.array, intensity=measure_intensity(done.image.array, clip=False))
    return (
        torch.from_numpy(image[index])[None, None],
        torch.from_numpy(done.mask.array[index].astype(np.float32))[None, None],
    )


def draw_spatial(path: Path, case: PhantomCase, *, name: str) -> None:
    """Draw one spatial transform, the others switched off; `mirroring` is the one that is never off."""
    image, mask = training_slice(case)
    with mock.patch.multiple(augmentation, **(NEUTRAL | SPATIAL.get(name, {}))):
        grid = augmentation._sampling_grid(image.expand(NUM_DRAWS, -1, -1, -1), rng=_rng())
    is_mirrored = grid[:, 64, -1, 0] < grid[:, 64, 0, 0]
    chosen = grid[is_mirrored if name == "mirroring" else ~is_mirrored]
    chosen = chosen[: 1 if name == "mirroring" else NUM_EXAMPLES]
    sample = partial(functional.grid_sample, grid=chosen, padding_mode="border", align_corners=False)
    moved, masks = (sample(one.expand(len(chosen), -1, -1, -1), mode="bilinear") for one in (image, mask))
    _draw_examples(path, image, mask, moved, masks)


def intensity_transforms(kind: Augmentation) -> dict[str, Callable[..., torch.Tensor]]:
    """Return the intensity transforms with the strength of an option, each applied to every input, by name."""
    strength = INTENSITIES[kind]

    def alone(**ranges: Any) -> Callable[..., torch.Tensor]:
        return partial(_scale, kind=replace(strength, **(OFF | ranges)))

    return {
        "contrast": alone(contrast_range=strength.contrast_range),
        "brightness": alone(brightness_sd=strength.brightness_sd),
        "bias": alone(bias_sd=strength.bias_sd),
        "gamma": partial(augmentation._gamma, gamma_range=strength.gamma_range),
        "noise": partial(augmentation._noise, noise_sd=strength.noise_sd),
        "blur": augmentation._blur,
        "coil": augmentation._coil,
    }


def _scale(images: torch.Tensor, *, rng: torch.Generator, kind: augmentation.Intensities) -> torch.Tensor:
    return augmentation._scale_intensity_(images, kind, rng=rng)


def draw_intensity(path: Path, case: PhantomCase, *, name: str) -> None:
    """Draw one intensity transform: the input, and three draws of each option that differs."""
    image, mask = training_slice(case)
    panels = []
    for kind in _kinds_of(name):
        moved = intensity_transforms(kind)[name](image.repeat(NUM_EXAMPLES, 1, 1, 1), rng=_rng())
        title = {"blur": "all options"}.get(name, kind)
        panels.append(_example("input", image[0], mask[0]))
        panels += [_example(f"{title} {number + 1}", one, mask[0]) for number, one in enumerate(moved)]
    write_panels(path, panels)


def _kinds_of(name: str) -> Sequence[Augmentation]:
    """Return the options of `train.augmentation` in which a transform has different strengths."""
    return {"blur": ["standard"], "coil": ["coil"]}.get(name, ["standard", "strong"])  # type: ignore[return-value]


def draw_option(path: Path, case: PhantomCase, *, kind: Augmentation) -> None:
    """Draw random results of a whole option of `train.augmentation`."""
    image, mask = training_slice(case)
    images, masks = (one.repeat(12, 1, 1, 1) for one in (image, mask))
    if kind != "none":
        images, masks = augment(images, masks, rng=_rng(3), kind=kind)
    write_panels(
        path, [_example(f"{kind} {number + 1}", images[number], masks[number]) for number in range(6)], num_columns=3
    )


def options() -> Sequence[Augmentation]:
    """Return the options of `train.augmentation` that change something."""
    return [kind for kind in get_args(Augmentation) if kind != "none"]


def _draw_examples(
    path: Path, image: torch.Tensor, mask: torch.Tensor, moved: torch.Tensor, masks: torch.Tensor
) -> None:
    examples = [_example(f"example {number + 1}", *pair) for number, pair in enumerate(zip(moved, masks, strict=True))]
    write_panels(path, [_example("input", image[0], mask[0]), *examples])


def _example(title: str, image: torch.Tensor, mask: torch.Tensor) -> Panel:
    return Panel(title=title, pixels=image[0].numpy(), labels=(mask[0].numpy() > 0.5).astype(int), limits=(-2.0, 3.5))


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
