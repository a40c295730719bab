"""How time and memory grow with the data set: preprocess, prepare and one training epoch on 500, 1000 and 2000 studies.

    python -m scripts.hard_use.growth --sizes 500 1000 2000

The studies are small: an ellipsoid in random texture, because the anatomical phantom takes a second each. Time is the
processor's, of one thread, so that a busy machine changes nothing; memory is the peak of the process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import write_volume
from tests.project_helpers import clean_environment

SHAPE_VOX, SPACING_MM = (10, 64, 64), (4.0, 1.4, 1.4)
TEXTURE_MM = 2.5
"""Size of the structures around the gland."""

SETTINGS = (
    "data=folder",
    "preprocess.spacing_mm=[4,1.4,1.4]",
    "preprocess.image_size=32",
    "model.channels=[8,16]",
    "model.strides=[[2,2]]",
    "fold.index=0",
    "train.max_epochs=1",
    "train.steps_per_epoch=null",
    "train.batch_size=64",
    "machine.num_workers=1",
    "mlflow=off",
)
STAGES = ("preprocess", "prepare", "train")


def make_study(folder: Path, number: int) -> str:
    """Write a study of a patient of its own, and return its id: an ellipsoid in random texture."""
    rng = np.random.default_rng(number)
    index = np.stack(np.meshgrid(*(np.arange(size) - (size - 1) / 2 for size in SHAPE_VOX), indexing="ij"), axis=-1)
    radii_mm, centre_mm = rng.uniform((11, 15, 18), (16, 20, 24)), rng.uniform(-4, 4, 3)
    gland = (((index * SPACING_MM - centre_mm) / radii_mm) ** 2).sum(axis=-1) < 1
    texture = ndimage.gaussian_filter(rng.normal(size=SHAPE_VOX), TEXTURE_MM / np.array(SPACING_MM))
    array = 600 + 100 * gland + 120 * texture / texture.std() + rng.normal(0, 10, SHAPE_VOX)
    geometry = Geometry(
        shape_vox=SHAPE_VOX, spacing_mm=SPACING_MM, origin_mm=(0, 0, 0), direction=tuple(np.eye(3).ravel())
    )
    name = f"{number:05d}_1"
    write_volume(folder / f"images/{name}.nii.gz", Volume(array=array.clip(0).astype(np.int16), geometry=geometry))
    write_volume(folder / f"masks/{name}.nii.gz", Volume(array=gland, geometry=geometry))
    return name


def linked(folder: Path, source: Path, names: list[str]) -> Path:
    """Return a folder with links to some of the studies."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for name in names:
            (folder / kind / f"{name}.nii.gz").symlink_to(source / kind / f"{name}.nii.gz")
    return folder


def measured(stage: str, *, data: Path, workspace: Path) -> tuple[float, float]:
    """Return the processor's seconds and the peak MiB of a stage."""
    command = [sys.executable, "-m", "prostate_seg", f"stage={stage}", f"data.root={data}", *SETTINGS]
    environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
    workspace.mkdir(exist_ok=True)
    with (workspace / f"{stage}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=workspace, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (workspace / f"{stage}.log").read_text()
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.monotonic()
        names = [make_study(folder / "all", number) for number in range(max(arguments.sizes))]
        print(f"{len(names)} studies made in {time.monotonic() - started:.0f} s")
        print("studies  stage         CPU s     ms/study  peak MiB")
        for size in arguments.sizes:
            data = linked(folder / f"data{size}", folder / "all", names[:size])
            for stage in STAGES:
                seconds, mib = measured(stage, data=data, workspace=folder / f"workspace{size}")
                print(f"{size:7d}  {stage:<12} {seconds:8.1f} {1000 * seconds / size:9.1f} {mib:9.0f}", flush=True)


if __name__ == "__main__":
    main()
