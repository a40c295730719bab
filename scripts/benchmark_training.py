"""The training rows of `make bench`: time of a step, an epoch and a complete training, and memory.

They run on a GPU if there is one.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prostate_seg.config.schema import Config
from prostate_seg.imaging.preprocessing import PreprocessSettings
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.segmentation.networks.storage import Recipe
from prostate_seg.segmentation.settings import Precision
from prostate_seg.segmentation.training.history import Epoch
from prostate_seg.segmentation.training.packing import PackedSet

if TYPE_CHECKING:
    import torch

NUM_STEPS = 15
"""Steps of a short epoch."""


def step_seconds(*, precision: Precision) -> tuple[float, float]:
    """Return the seconds of a step of training, and of the bare step."""
    cfg = benchmark_config()
    cfg = replace(cfg, train=replace(cfg.train, precision=precision))
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_noise(Path(folder) / "packed", num_cases=20)
        baseline = bare_steps(cfg, packed, num_steps=NUM_STEPS)
        whole, alone = epochs_in_turn(cfg, packed, baseline, num_steps=NUM_STEPS, num_epochs=12)
    return whole / NUM_STEPS, alone / NUM_STEPS


def bare_step(cfg: Config, packed: PackedSet) -> "Callable[[], torch.Tensor]":
    """Return a function that takes a step on one batch in memory and returns its loss: forward, loss, backward, optimiser."""
    import torch

    from prostate_seg.segmentation.devices import autocast, choose_device
    from prostate_seg.segmentation.networks.networks import build_network, is_3d
    from prostate_seg.segmentation.training.losses import build_loss
    from prostate_seg.segmentation.training.packing import Batches
    from prostate_seg.segmentation.training.training_step import build_optimizer

    device, volumetric = choose_device(cfg.machine.device), is_3d(cfg.model)
    network, loss = build_network(cfg.model).to(device), build_loss(cfg.train.loss)
    optimizer = build_optimizer(network, cfg.train)
    batches = Batches(packed, recipe_of(cfg, train_ids=list(packed.cases)), device=device)
    slices = torch.from_numpy(batches.slices[: cfg.train.batch_size]).to(batches.images.device)
    images, masks = (batch[:, None] if volumetric else batch for batch in batches.load(slices))

    def step() -> torch.Tensor:
        with autocast(device, precision=cfg.train.precision):
            logits = network(images)
        value = loss(logits.float(), masks)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def bare_steps(cfg: Config, packed: PackedSet, *, num_steps: int) -> Callable[[], None]:
    """Return a function that takes steps as `bare_step` and waits for the last one."""
    step = bare_step(cfg, packed)

    def steps() -> None:
        for _ in range(num_steps):
            value = step()
        value.item()  # waits for the device

    return steps


def grid_seconds(in_turn: Callable[..., tuple[float, float]]) -> tuple[float, float]:
    """Return the seconds of a step with slices of the default grid, and of 0.625 mm: 128 and 160 pixels for 100 mm."""
    cfg = benchmark_config()
    with tempfile.TemporaryDirectory() as folder:
        coarse, fine = (
            bare_steps(cfg, pack_noise(Path(folder) / str(size), num_cases=2, size=size), num_steps=NUM_STEPS)
            for size in (128, 160)
        )
        seconds, fine_seconds = in_turn(coarse, fine, repeats=5)
    return seconds / NUM_STEPS, fine_seconds / NUM_STEPS


def zones_seconds(in_turn: Callable[..., tuple[float, float]]) -> tuple[float, float]:
    """Return the seconds of 30 steps of training with the whole gland and two zones, and with the whole gland alone."""
    zones, gland = benchmark_config("target=zones"), benchmark_config()
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_noise(Path(folder) / "packed", num_cases=20)

        def run(cfg: Config) -> None:
            train(cfg, packed, num_steps=30, num_epochs=1, on_epoch_end=lambda _: None)

        return in_turn(lambda: run(zones), lambda: run(gland), repeats=7)


def deterministic_seconds(in_turn: Callable[..., tuple[float, float]]) -> tuple[float, float]:
    """Return the seconds of 30 steps of training with and without deterministic operations."""
    cfg = benchmark_config()
    free = replace(cfg, train=replace(cfg.train, deterministic=False))
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_noise(Path(folder) / "packed", num_cases=20)

        def run(settings: Config) -> None:
            train(settings, packed, num_steps=30, num_epochs=1, on_epoch_end=lambda _: None)

        return in_turn(lambda: run(cfg), lambda: run(free), repeats=5)


def seconds_to_dice(dice: float) -> tuple[float, float, int]:
    """Train the default network on the demo's phantom, fold 0, until val Dice is reached.

    Returns:
        Seconds of training with validation, seconds of the same number of bare steps, and the number of steps.
    """
    from prostate_seg.config.workspace import workspace_of
    from prostate_seg.data.dataset import read_dataset
    from prostate_seg.data.folds import read_folds
    from prostate_seg.segmentation.training.packing import open_packed
    from prostate_seg.stages.train import pack_studies, packed_folder

    class Reached(Exception):  # noqa: N818 - a signal, not an error
        pass

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["experiment=quickstart", f"paths.root={folder}", f"paths.cache={folder}/cache", "mlflow=off"]
        command = [sys.executable, "-m", "prostate_seg", "-m", "stage=fetch,preprocess,prepare", *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        cfg = benchmark_config(*arguments)
        workspace = workspace_of(cfg)
        pack_studies(cfg, workspace, read_dataset(workspace.dataset_csv))
        packed, fold = open_packed(packed_folder(cfg, workspace)), read_folds(workspace.kfold_json)[0]
        steps_per_epoch = cfg.train.steps_per_epoch or 50
        baseline = bare_steps(cfg, packed, num_steps=steps_per_epoch)
        baseline()  # warm-up
        seconds, bare_seconds, dices = 0.0, 0.0, []
        mark = time.perf_counter()

        def after_epoch(epoch: Epoch) -> None:
            nonlocal seconds, bare_seconds, mark
            start = time.perf_counter()
            seconds += start - mark
            baseline()
            mark = time.perf_counter()
            bare_seconds += mark - start
            dices.append(epoch.val_dice or 0.0)
            if dices[-1] >= dice:
                raise Reached

        with contextlib.suppress(Reached):
            train(
                cfg,
                packed,
                num_steps=steps_per_epoch,
                num_epochs=60,
                on_epoch_end=after_epoch,
                train_ids=fold.train,
                val_ids=fold.val,
            )
            raise RuntimeError(f"val Dice is only {max(dices):.3f} after {len(dices)} epochs")
    return seconds, bare_seconds, steps_per_epoch * len(dices)


def epochs_in_turn(
    cfg: Config, packed: PackedSet, baseline: Callable[[], None], *, num_steps: int, num_epochs: int
) -> tuple[float, float]:
    """Return the median seconds of an epoch of one training run, and of the baseline, which runs after each epoch."""
    epochs, baselines, mark = [], [], time.perf_counter()

    def after_epoch(_: Epoch) -> None:
        nonlocal mark
        start = time.perf_counter()
        baseline()
        end = time.perf_counter()
        epochs.append(start - mark)
        baselines.append(end - start)
        mark = time.perf_counter()

    train(cfg, packed, num_steps=num_steps, num_epochs=num_epochs, on_epoch_end=after_epoch)
    return statistics.median(epochs[1:]), statistics.median(baselines[1:])


def train(
    cfg: Config,
    packed: PackedSet,
    *,
    num_steps: int,
    num_epochs: int,
    on_epoch_end: Callable[[Epoch], None],
    train_ids: Sequence[str] | None = None,
    val_ids: Sequence[str] = (),
) -> None:
    """Run the training loop of the package."""
    from prostate_seg.segmentation.devices import choose_device
    from prostate_seg.segmentation.networks.networks import build_network
    from prostate_seg.segmentation.training.training import fit, reproducible

    with reproducible(0, deterministic=cfg.train.deterministic):
        fit(
            packed,
            network=build_network(cfg.model, num_regions=len(cfg.target.regions)),
            recipe=recipe_of(cfg, train_ids=list(packed.cases) if train_ids is None else train_ids, val_ids=val_ids),
            settings=replace(cfg.train, steps_per_epoch=num_steps, max_epochs=num_epochs),
            device=choose_device(cfg.machine.device),
            seed=0,
            on_epoch_end=on_epoch_end,
        )


def train_once(folder: Path) -> None:
    """Train an epoch on a packed set of 100 studies and write its peak memory to memory.json."""
    from prostate_seg.segmentation.networks.networks import build_network

    cfg = benchmark_config()
    packed = pack_noise(folder / "packed", num_cases=100)
    train(cfg, packed, num_steps=40, num_epochs=1, on_epoch_end=lambda _: None)
    parameters = sum(value.nbytes for value in build_network(cfg.model).state_dict().values())
    usage = {
        "peak": _peak_bytes(),
        "packed": packed.images.nbytes + packed.masks.nbytes,
        "model": 4 * parameters,  # weights, gradients and the two moments of AdamW
    }
    (folder / "memory.json").write_text(json.dumps(usage))


def _peak_bytes() -> int:
    """Return the peak resident memory of this process; ru_maxrss has that of the parent before exec too."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def benchmark_config(*overrides: str) -> Config:
    """Return the default config with these overrides."""
    from hydra import compose, initialize_config_dir

    from prostate_seg.cli import config_folder
    from prostate_seg.config.schema import parse

    with initialize_config_dir(config_dir=str(config_folder())):
        return parse(compose("config", overrides=["paths.root=.", *overrides]))


def recipe_of(cfg: Config, *, train_ids: Sequence[str] = (), val_ids: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a network with these cases."""
    return Recipe(
        model=cfg.model,
        preprocess=preprocess_settings(cfg),
        zscore=False,
        train_ids=list(train_ids),
        val_ids=list(val_ids),
    )


def preprocess_settings(cfg: Config) -> PreprocessSettings:
    """Return the settings of the network's input, whose grid is given in numbers."""
    zones = [name for name in sorted(cfg.target.regions) if name != WHOLE_GLAND]
    labels = {name: (number,) for number, name in enumerate(zones, start=1)}
    regions = {WHOLE_GLAND: tuple(range(1, 1 + len(zones))) if zones else cfg.data.whole_gland_labels, **labels}
    return PreprocessSettings.of(cfg.preprocess, regions=regions, chosen={})


def pack_noise(folder: Path, *, num_cases: int, size: int = 128) -> PackedSet:
    """Pack synthetic studies of 22 slices, by default of 128x128 as on the default grid."""
    from prostate_seg.segmentation.training.packing import pack

    def read_case(case_id: str) -> tuple[np.ndarray, np.ndarray]:
        image = np.random.default_rng(int(case_id)).integers(0, 255, size=(22, size, size), dtype=np.uint8)
        mask = np.zeros_like(image)
        mask[5:17, size // 3 : 2 * size // 3, size // 4 : 3 * size // 4] = 0b011  # bits: the gland and two zones in it
        mask[5:17, size // 2 : 2 * size // 3, size // 4 : 3 * size // 4] = 0b101
        return image, mask

    return pack(folder, [str(number) for number in range(num_cases)], read_case=read_case, zscore=False)
