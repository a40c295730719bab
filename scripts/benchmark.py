"""Measure speed and memory as ratios against a baseline that is timed in the same run, as JSON and as a table.

`make bench` runs all rows; `--rows launch metrics` selects rows. The two sides of a row are timed alternately (A B A B ...) and
their medians are compared, so that a slow period of the machine affects both. All data are synthetic.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from benchmark_prediction import NUM_FOLDS, network_runs, study_runs
from benchmark_sweep import trial_seconds
from benchmark_tracking import hashing_seconds, recording_seconds, tracked_prepare_seconds
from benchmark_training import (
    benchmark_config,
    deterministic_seconds,
    grid_seconds,
    pack_noise,
    preprocess_settings,
    seconds_to_dice,
    step_seconds,
    train,
    train_once,
    zones_seconds,
)

from prostate_seg.imaging.preprocessing import PreprocessSettings
from prostate_seg.segmentation.settings import Precision

ROOT = Path(__file__).parents[1]
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured ratio."""

    name: str
    ours: str
    against: str
    ratio: float
    target: str
    is_met: bool


def main() -> None:
    """Run the chosen rows, print the table and write the JSON."""
    rows: dict[str, Callable[[], Row]] = {
        "launch": launch_row,
        "preprocess": preprocess_row,
        "training_step": training_step_row,
        "step_fp32": training_step_fp32_row,
        "grid": grid_row,
        "zones": zones_row,
        "deterministic": deterministic_row,
        "time_to_dice": time_to_dice_row,
        "metrics": metrics_row,
        "memory": memory_row,
        "tracked_prepare": tracked_prepare_row,
        "tracked_train": tracked_training_row,
        "tracked_http": tracked_http_row,
        "hashing": hashing_row,
        "sweep_trial": sweep_trial_row,
        "predict": predict_row,
        "ensemble": ensemble_row,
        "onnx": onnx_row,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows))
    parser.add_argument("--train-once", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train_once:
        train_once(arguments.train_once)
        return
    measured = []
    for name in arguments.rows:
        measured.append(rows[name]())
        print(line_of(measured[-1]), flush=True)
    arguments.output.write_text(json.dumps([asdict(row) for row in measured], indent=1) + "\n", encoding="utf-8")


def line_of(row: Row) -> str:
    """Return a row as text that fits a terminal."""
    verdict = "ok  " if row.is_met else "MISS"
    return (
        f"{verdict} {row.name:<14} {row.ratio:6.2f} (target {row.target})\n     {row.ours}\n     against {row.against}"
    )


def in_turn(ours: Callable[[], object], against: Callable[[], object], *, repeats: int) -> tuple[float, float]:
    """Return the median seconds of both, timed alternately after a warm-up round."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for round_index in range(repeats + 1):
        for which, function in enumerate((ours, against)):
            start = time.perf_counter()
            function()
            if round_index:
                seconds[which].append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def launch_row() -> Row:
    """Time `--cfg job` against an empty Hydra app."""
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "empty.py"
        app.write_text("import hydra\n@hydra.main()\ndef app(cfg): pass\nif __name__ == '__main__': app()\n")

        def run(*command: str) -> None:
            subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)

        ours, empty = in_turn(lambda: run("-m", "prostate_seg", "--cfg", "job"), lambda: run(str(app)), repeats=9)
    return Row(
        name="launch",
        ours=f"--cfg job {ours:.2f} s",
        against=f"an empty Hydra app {empty:.2f} s",
        ratio=ours / empty,
        target="at most 1.5",
        is_met=ours / empty <= 1.5,
    )


def preprocess_row() -> Row:
    """Time the preprocessing of large studies against sequential SimpleITK."""
    from prostate_seg.common.progress import map_cases
    from prostate_seg.data.cases import discover_cases
    from prostate_seg.stages.preprocess import preprocess_case

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_large_studies(folder / "data", num_studies=4)
        cases, _ = discover_cases(folder / "data", patient_pattern="(.+)", exclude=[])
        default = preprocess_settings(benchmark_config())

        def ours(settings: PreprocessSettings = default, name: str = "ours") -> None:
            folders = {"data": folder / "data", "folder": folder / name}
            work = partial(preprocess_case, settings=settings, allow_others=False, **folders)
            map_cases(work, cases, num_workers=None, label="preprocess")

        def naive(settings: PreprocessSettings = default, name: str = "naive") -> None:
            for case in cases:
                assert case.mask is not None
                naive_preprocess(case.image, case.mask, folder / name, settings=settings)

        fast, slow = in_turn(ours, naive, repeats=3)
        # SimpleITK has no anti-aliasing filter, so that the values are compared on a grid that is finer than the studies.
        fine = replace(default, spacing_mm=(3.0, 0.3, 0.3))
        ours(fine, "ours, fine"), naive(fine, "naive, fine")
        difference = largest_difference(folder / "ours, fine" / "images", folder / "naive, fine" / "images")
    return Row(
        name="preprocess",
        ours=f"{len(cases)} studies of 640x640x24 in {fast:.2f} s",
        against=f"reading, full B-spline, crop, write in SimpleITK {slow:.2f} s; "
        f"largest difference on a fine grid {difference} of 255",
        ratio=slow / fast,
        target="at least 5",
        is_met=slow / fast >= 5 and difference <= 1,
    )


def write_large_studies(folder: Path, *, num_studies: int) -> None:
    """Write smooth random studies of 640x640x24 at 0.3125 x 3.3 mm with an ellipsoid as mask."""
    from scipy import ndimage

    from prostate_seg.imaging.geometry import Geometry, Volume
    from prostate_seg.imaging.image_io import write_volume

    geometry = Geometry(
        shape_vox=(24, 640, 640),
        spacing_mm=(3.3, 0.3125, 0.3125),
        origin_mm=(-100.0, -100.0, -40.0),
        direction=(1, 0, 0, 0, 1, 0, 0, 0, 1),
    )
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in geometry.shape_vox), indexing="ij", sparse=True)
    ellipsoid = (z / 0.6) ** 2 + (y / 0.2) ** 2 + (x / 0.25) ** 2 < 1
    for index in range(num_studies):
        noise = np.random.default_rng(index).normal(size=geometry.shape_vox).astype(np.float32)
        smooth = ndimage.gaussian_filter(noise, (0.5, 2, 2))
        image = (400 + 900 * smooth + 200 * ellipsoid).clip(0, 4000).astype(np.int16)
        write_volume(folder / "images" / f"s{index}.nii.gz", Volume(array=image, geometry=geometry))
        write_volume(folder / "masks" / f"s{index}.nii.gz", Volume(array=ellipsoid.astype(np.uint8), geometry=geometry))


def naive_preprocess(image_path: Path, mask_path: Path, folder: Path, *, settings: PreprocessSettings) -> None:
    """Preprocess as a simple script would: resample the whole study with SimpleITK, then crop its centre and rescale it."""
    import SimpleITK as sitk

    assert settings.spacing_mm is not None
    length = settings.image_size
    for kind, path, interpolator in (
        ("images", image_path, sitk.sitkBSpline),
        ("masks", mask_path, sitk.sitkNearestNeighbor),
    ):
        image = sitk.ReadImage(str(path), sitk.sitkFloat32)
        spacing = np.array(settings.spacing_mm[::-1])
        old_size, old_spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
        size = np.round(old_size * old_spacing / spacing).astype(int)
        first = (old_size - 1) / 2 - (size - 1) / 2 * spacing / old_spacing
        origin = image.TransformContinuousIndexToPhysicalPoint(first.tolist())
        whole = sitk.Resample(
            image, size.tolist(), sitk.Transform(), interpolator, origin, spacing.tolist(), image.GetDirection()
        )
        x, y = ((int(whole_length) - length + 1) // 2 for whole_length in size[:2])
        kept = whole[x : x + length, y : y + length, :]
        if kind == "images":
            low, high = np.percentile(sitk.GetArrayViewFromImage(kept), (0.5, 99.5))
            kept = sitk.Round(sitk.IntensityWindowing(kept, float(low), float(high), 0.0, 255.0))
        (folder / kind).mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.Cast(kept, sitk.sitkUInt8), str(folder / kind / path.name), useCompression=True)


def largest_difference(first: Path, second: Path) -> int:
    """Return the largest difference between the images of two folders."""
    from prostate_seg.imaging.image_io import read_volume

    def difference(path: Path) -> int:
        a, b = (read_volume(folder / path.name).array.astype(int) for folder in (first, second))
        return int(np.abs(a - b).max())

    return max(difference(path) for path in first.iterdir())


def training_step_row() -> Row:
    """Time epochs of training against forward, loss, backward and optimiser alone, with default settings."""
    return _step_row("training_step", "auto")


def training_step_fp32_row() -> Row:
    """Time the same in float32."""
    return _step_row("step_fp32", "fp32")


def _step_row(name: str, precision: Precision) -> Row:
    whole, alone = step_seconds(precision=precision)
    return Row(
        name=name,
        ours=f"a step with loading, augmentation, EMA weights and logging {1000 * whole:.1f} ms",
        against=f"forward, loss, backward and optimiser alone {1000 * alone:.1f} ms",
        ratio=alone / whole,
        target="at least 0.85",
        is_met=alone / whole >= 0.85,
    )


def grid_row() -> Row:
    """Time a step of the default grid against one of the finest grid that was compared (docs/decisions.md)."""
    seconds, fine_seconds = grid_seconds(in_turn)
    return Row(
        name="grid",
        ours=f"forward, loss, backward and optimiser with slices of 128x128, 0.8 mm, {1000 * seconds:.1f} ms",
        against=f"with slices of 160x160, 0.625 mm, {1000 * fine_seconds:.1f} ms",
        ratio=seconds / fine_seconds,
        target="at most 0.75",
        is_met=seconds / fine_seconds <= 0.75,
    )


def zones_row() -> Row:
    """Time training with three regions against training with the whole gland alone.

    Norm, convolution and loss of three outputs take 5 ms of a step of 60 ms.
    """
    zones, gland = zones_seconds(in_turn)
    return Row(
        name="zones",
        ours=f"30 steps with target=zones {zones:.2f} s",
        against=f"with target=whole_gland {gland:.2f} s",
        ratio=zones / gland,
        target="at most 1.1",
        is_met=zones / gland <= 1.1,
    )


def deterministic_row() -> Row:
    """Time epochs with deterministic operations against epochs without."""
    strict, free = deterministic_seconds(in_turn)
    return Row(
        name="deterministic",
        ours=f"30 steps with train.deterministic=true {strict:.2f} s",
        against=f"with train.deterministic=false {free:.2f} s",
        ratio=strict / free,
        target="at most 1.1",
        is_met=strict / free <= 1.1,
    )


def time_to_dice_row() -> Row:
    """Train on the phantom until val Dice is 0.9, and time the same number of bare steps."""
    seconds, alone, num_steps = seconds_to_dice(0.9)
    return Row(
        name="time_to_dice",
        ours=f"phantom, a new network to val Dice 0.90: {seconds:.0f} s, {num_steps} steps, {num_steps // 50} validations",
        against=f"forward, loss, backward and optimiser alone, the same number of steps {alone:.0f} s",
        ratio=alone / seconds,
        target="at least 0.75",
        is_met=alone / seconds >= 0.75,
    )


def metrics_row() -> Row:
    """Time all per-case metrics against MONAI's for the same masks."""
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
    from monai.metrics.meandice import compute_dice
    from monai.metrics.meaniou import compute_iou
    from scipy import ndimage

    from prostate_seg.segmentation.metrics import case_metrics

    spacing_mm, pairs = (3.0, 0.5, 0.5), []
    z, y, x = np.meshgrid(np.arange(19), np.arange(384), np.arange(384), indexing="ij", sparse=True)
    reference = ((z - 9) / 6) ** 2 + ((y - 190) / 40) ** 2 + ((x - 200) / 55) ** 2 < 1
    for seed in range(3):
        noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=reference.shape), (1, 6, 6))
        distance = ndimage.gaussian_filter(reference.astype(float), (0.5, 3, 3)) + 2 * noise
        pairs.append((reference, distance > 0.5))

    def ours() -> None:
        for truth, predicted in pairs:
            case_metrics(truth, predicted, spacing_mm=spacing_mm)

    def monai() -> None:
        for truth, predicted in pairs:
            a, b = (torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth))
            compute_dice(a, b)
            compute_iou(a, b)
            compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing_mm)
            compute_average_surface_distance(a, b, include_background=True, symmetric=True, spacing=spacing_mm)
            compute_surface_dice(
                a, b, class_thresholds=[2.0], include_background=True, spacing=spacing_mm, use_subvoxels=True
            )

    fast, slow = in_turn(ours, monai, repeats=5)
    return Row(
        name="metrics",
        ours=f"all metrics of a case of 384x384x19 {1000 * fast / len(pairs):.0f} ms",
        against=f"Dice, IoU, HD95, ASSD and NSD in MONAI {1000 * slow / len(pairs):.0f} ms",
        ratio=slow / fast,
        target="at least 5",
        is_met=slow / fast >= 5,
    )


def memory_row() -> Row:
    """Compare the peak resident memory of training with packed set + model + 1 GiB, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--train-once", folder]
        subprocess.run(command, check=True, cwd=ROOT)
        usage = json.loads((Path(folder) / "memory.json").read_text())
    allowed = usage["packed"] + usage["model"] + GIB
    return Row(
        name="memory",
        ours=f"peak of a training process {usage['peak'] / GIB:.2f} GiB",
        against=f"packed set {usage['packed'] / GIB:.2f} + model {usage['model'] / GIB:.2f} + 1 GiB",
        ratio=usage["peak"] / allowed,
        target="at most 1",
        is_met=usage["peak"] <= allowed,
    )


def tracked_prepare_row() -> Row:
    """Time a short stage with MLflow against a script with the same imports and log calls."""
    ours, bare = tracked_prepare_seconds(in_turn)
    return Row(
        name="tracked_prepare",
        ours=f"stage=prepare with MLflow on an existing sqlite file {ours:.2f} s",
        against=f"a bare script with its imports and log calls {bare:.2f} s",
        ratio=ours / bare,
        target="at most 1.25",
        is_met=ours / bare <= 1.25,
    )


def tracked_training_row() -> Row:
    """Time an epoch recorded in sqlite against one that is not recorded."""
    return _tracked_row("tracked_train", "sqlite", 1.01)


def tracked_http_row() -> Row:
    """Time an epoch recorded on a server of this machine against one that is not recorded."""
    return _tracked_row("tracked_http", "http", 1.02)


def _tracked_row(name: str, store: str, most: float) -> Row:
    added, epoch = tracked_epochs()[store], tracked_epochs()["off"] * DEFAULT_STEPS / SHORT_STEPS
    return Row(
        name=name,
        ours=f"{store}: {1000 * added:.1f} ms more an epoch",
        against=f"an epoch of {DEFAULT_STEPS} steps with mlflow=off, {epoch:.2f} s",
        ratio=(epoch + added) / epoch,
        target=f"at most {most}",
        is_met=(epoch + added) / epoch <= most,
    )


DEFAULT_STEPS, SHORT_STEPS = 50, 10
"""Steps of an epoch by default, and in this measurement."""


@cache
def tracked_epochs() -> dict[str, float]:
    """Measure once for both rows."""
    cfg = benchmark_config()
    with tempfile.TemporaryDirectory() as folder:
        packed = pack_noise(Path(folder) / "packed", num_cases=20)
        return recording_seconds(
            cfg,
            lambda hook, num_epochs: train(
                cfg, packed, num_steps=SHORT_STEPS, num_epochs=num_epochs, on_epoch_end=hook
            ),
            num_rounds=30,
        )


def hashing_row() -> Row:
    """Time the hashes of new files against md5sum on all cores."""
    ours, theirs, again = hashing_seconds(in_turn)
    return Row(
        name="hashing",
        ours=f"64 files of 8 MiB {1000 * ours:.0f} ms, unchanged ones {1000 * again:.0f} ms",
        against=f"md5sum on all cores {1000 * theirs:.0f} ms",
        ratio=theirs / ours,
        target="at least 0.9",
        is_met=theirs / ours >= 0.9,
    )


QUICK_TRIAL_SECONDS = 120.0
"""Training of a short trial: the two folds of experiment=quickstart."""


def sweep_trial_row() -> Row:
    """Time the overhead of a trial in addition to its training."""
    whole, trained = trial_seconds(num_trials=9)
    added = whole - trained
    ratio = (QUICK_TRIAL_SECONDS + added) / QUICK_TRIAL_SECONDS
    return Row(
        name="sweep_trial",
        ours=f"a trial of two folds takes {whole:.2f} s with Optuna and MLflow: {added:.2f} s more",
        against=f"its training alone {trained:.2f} s; the ratio is that of a trial that trains {QUICK_TRIAL_SECONDS:.0f} s",
        ratio=ratio,
        target="at most 1.02",
        is_met=ratio <= 1.02,
    )


STUDY_SECONDS = 2.0
"""Target for a study from file to mask and overlay, with a loaded network."""


def predict_row() -> Row:
    """Time a study from file to mask, overlay and record."""
    with study_runs() as (alone, _):
        seconds, _ = in_turn(alone, lambda: None, repeats=9)
    return Row(
        name="predict",
        ours=f"a study of 384x384x19, one network, no test-time augmentation, to mask, overlay and record: {seconds:.2f} s",
        against=f"{STUDY_SECONDS:g} s",
        ratio=seconds / STUDY_SECONDS,
        target="at most 1",
        is_met=seconds <= STUDY_SECONDS,
    )


def ensemble_row() -> Row:
    """Time an ensemble against the same number of predictions by one network."""
    with study_runs() as (alone, together):
        ensemble, one = in_turn(together, alone, repeats=9)
    ratio = ensemble / (NUM_FOLDS * one)
    return Row(
        name="ensemble",
        ours=f"the same with {NUM_FOLDS} networks {ensemble:.2f} s",
        against=f"{NUM_FOLDS} times {one:.2f} s with one",
        ratio=ratio,
        target="at most 1",
        is_met=ratio <= 1,
    )


def onnx_row() -> Row:
    """Time each network with ONNX Runtime against torch; the ratio is that of the default network."""
    ratios = {}
    for name in ("unet", "attention_unet", "resunet_a", "dynunet", "segresnet", "unet3d"):
        with network_runs(name) as (by_onnx, by_torch):
            onnx, torch = in_turn(by_onnx, by_torch, repeats=5)
        ratios[name] = onnx / torch
    listing = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return Row(
        name="onnx",
        ours=f"ONNX Runtime in float32, of torch's time: {listing}",
        against="torch as in a prediction: bfloat16 where the processor has it",
        ratio=ratios["unet"],
        target="none: below 1 it is faster",
        is_met=True,
    )


if __name__ == "__main__":
    main()
