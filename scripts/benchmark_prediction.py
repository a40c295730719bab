"""The prediction rows of `make bench`: time of a study from file to mask, with one network, an ensemble and ONNX Runtime.

Networks have random weights; the study is synthetic: 384 x 384 x 19 voxels of 0.5 x 0.5 x 3 mm, as in PI-CAI.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from benchmark_training import benchmark_config, preprocess_settings

from prostate_seg.config.schema import Config
from prostate_seg.data.predictions import Target
from prostate_seg.data.scans import Scan
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import write_volume
from prostate_seg.segmentation.devices import autocast
from prostate_seg.segmentation.inference.settings import Usage
from prostate_seg.segmentation.networks.model_folder import load_model
from prostate_seg.segmentation.networks.networks import build_network, is_3d
from prostate_seg.segmentation.networks.onnx_network import OnnxNetwork, export_onnx
from prostate_seg.segmentation.networks.storage import Recipe, save_recipe, save_weights
from prostate_seg.stages.predict import segment_study

NUM_FOLDS = 5
CPU = torch.device("cpu")

Run = Callable[[], object]


@contextmanager
def study_runs() -> Iterator[tuple[Run, Run]]:
    """Yield functions that segment the study with one network and with an ensemble of `NUM_FOLDS`, without tta."""
    cfg = benchmark_config()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_volume(folder / "study.mha", synthetic_study())
        for number in range(NUM_FOLDS):
            save_network(folder / "model" / f"fold{number}", cfg, seed=number)
        usage = Usage(threshold=0.5, largest_component=True, tta=False, precision="auto")

        def run(fold_index: int | None) -> Run:
            model = load_model(folder / "model", fold_index=fold_index, usage=usage, device=CPU)
            target = Target(scan=Scan(name="study", path=folder / "study.mha"), output=folder / "out")
            return lambda: segment_study(target, model=model, min_expected_dice=cfg.predict.min_expected_dice)

        yield run(0), run(None)


@contextmanager
def network_runs(model: str) -> Iterator[tuple[Run, Run]]:
    """Yield functions that compute the logits of a study with ONNX Runtime, and with torch as in a prediction."""
    cfg = benchmark_config(f"model={model}")
    torch.manual_seed(0)
    network = build_network(cfg.model).eval()
    size = cfg.preprocess.image_size
    shape = (2, 1, cfg.model.num_slices, size, size) if is_3d(cfg.model) else (19, cfg.model.num_slices, size, size)
    inputs = torch.randn(shape)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        export_onnx(Path(name) / "network.onnx", network, model=cfg.model, image_size=size)
        by_onnx = OnnxNetwork(Path(name) / "network.onnx")

        def by_torch() -> None:
            with autocast(CPU, precision="auto"):
                network(inputs)

        yield lambda: by_onnx(inputs), by_torch


def synthetic_study() -> Volume:
    """Return an ellipsoid in noise, uint16."""
    z, y, x = np.meshgrid(np.arange(19), np.arange(384), np.arange(384), indexing="ij", sparse=True)
    gland = ((z - 9) / 6) ** 2 + ((y - 190) / 40) ** 2 + ((x - 200) / 55) ** 2 < 1
    image = np.random.default_rng(0).normal(300, 60, size=gland.shape) + 250 * gland
    geometry = Geometry(
        shape_vox=(19, 384, 384), spacing_mm=(3.0, 0.5, 0.5), origin_mm=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)
    )
    return Volume(array=image.clip(0, 2000).astype(np.uint16), geometry=geometry)


def save_network(folder: Path, cfg: Config, *, seed: int) -> None:
    """Write a network of the default settings with random weights."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_weights(folder, build_network(cfg.model).state_dict())
    settings = replace(preprocess_settings(cfg), crop="center")
    save_recipe(folder, Recipe(model=cfg.model, preprocess=settings, zscore=False, train_ids=[], val_ids=[]))
