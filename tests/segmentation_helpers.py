"""Small networks, settings and packed sets for the tests of `segmentation`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prostate_seg.imaging.preprocessing import PreprocessSettings
from prostate_seg.segmentation.inference.inference import Predictor
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.settings import ModelConfig, ModelName
from prostate_seg.segmentation.networks.storage import Recipe
from prostate_seg.segmentation.settings import Precision
from prostate_seg.segmentation.training.packing import PackedSet, pack
from prostate_seg.segmentation.training.settings import TrainConfig

SIZE = 32
TRAIN, VAL = ["a", "b", "c"], ["d"]

SETTINGS = PreprocessSettings(
    spacing_mm=(3.0, 0.5, 0.5),
    image_size=SIZE,
    crop="center",
    to_8bit=True,
    intensity_percentiles=(0.5, 99.5),
    whole_gland_labels=None,
    zones={},
)


def model_2d(*, num_slices: int = 1) -> ModelConfig:
    return ModelConfig(
        name="unet",
        num_slices=num_slices,
        channels=[4, 8],
        strides=[[2, 2]],
        num_res_units=1,
        dilations=None,
        norm="instance",
        activation="prelu",
        dropout=0.0,
    )


def small_model(name: ModelName) -> ModelConfig:
    """Return the smallest config of each network that still has all of its components."""
    if name == "unet3d":
        return model_3d()
    own: dict[ModelName, dict[str, object]] = {
        "unet": {"num_res_units": 1},
        "resunet_a": {"dilations": [[1, 3], [1]]},
        "dynunet": {"channels": [4, 8, 8], "strides": [[2, 2], [2, 2]]},
        "segresnet": {"num_res_units": 1, "channels": [8, 16]},
    }
    plain = replace(model_2d(num_slices=3), num_res_units=0, norm="batch", activation="relu")
    return replace(plain, name=name, **own.get(name, {}))  # type: ignore[arg-type]


def model_3d(*, num_slices: int = 4) -> ModelConfig:
    return ModelConfig(
        name="unet3d",
        num_slices=num_slices,
        channels=[4, 8],
        strides=[[2, 2, 2]],
        num_res_units=0,
        dilations=None,
        norm="instance",
        activation="relu",
        dropout=0.0,
    )


def train_settings(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "init": None,
        "freeze": None,
        "loss": "dice_ce",
        "metric": "dice",
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup_fraction": 0.1,
        "batch_size": 4,
        "steps_per_epoch": None,
        "max_epochs": 3,
        "max_minutes": None,
        "slices": "all",
        "augmentation": "standard",
        "ema_decay": 0.5,
        "zscore": False,
        "precision": "fp32",
        "deterministic": True,
    }
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def recipe(
    model: ModelConfig | None = None,
    *,
    preprocess: PreprocessSettings = SETTINGS,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Recipe:
    return Recipe(
        model=model or model_2d(),
        preprocess=preprocess,
        zscore=False,
        train_ids=TRAIN,
        val_ids=VAL,
        ranges=ranges or {},
    )


def predictor(
    *networks: nn.Module,
    model: ModelConfig | None = None,
    preprocess: PreprocessSettings = SETTINGS,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    tta: bool = False,
    precision: Precision = "fp32",
) -> Predictor:
    return Predictor(
        networks=networks,
        recipe=recipe(model, preprocess=preprocess, ranges=ranges),
        usage=Usage(threshold=0.5, largest_component=True, tta=tta, precision=precision),
        device=torch.device("cpu"),
    )


def disc_study(seed: int, *, num_slices: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return a study, uint8, with a bright disc in its central slices, and its mask."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    center, radius = generator.uniform(12, 20, size=2), generator.uniform(5, 8)
    disc = np.hypot(y - center[0], x - center[1]) < radius
    mask = np.zeros((num_slices, SIZE, SIZE), dtype=np.uint8)
    mask[1:-1] = disc
    image = generator.normal(60, 10, size=mask.shape) + 100 * mask
    return image.clip(0, 255).astype(np.uint8), mask


def packed_discs(folder: Path, case_ids: Sequence[str], *, num_slices: int = 6, zscore: bool = False) -> PackedSet:
    studies = {case_id: disc_study(seed, num_slices=num_slices + seed % 2) for seed, case_id in enumerate(case_ids)}
    return pack(folder, list(case_ids), read_case=studies.__getitem__, zscore=zscore)
