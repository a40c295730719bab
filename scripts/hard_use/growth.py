"""How time and memory grow with the data set: preprocess, prepare and one training epoch on 500, 1000 and 2000 studies.

    python -m scripts.hard_use.growth --sizes 500 1000 2000

The studies are phantoms of 100 mm, a patient each. Time is the processor's, of one thread, so that a busy machine changes
nothing; memory is the peak of the process, pages of mapped files included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from prostate_seg.data.phantom import PhantomSettings, phantom_case_ids, write_phantom
from tests.project_helpers import clean_environment

PHANTOM = PhantomSettings(
    num_patients=1,
    num_second_studies=0,
    field_of_view_mm=100.0,
    num_slices_range=(10, 12),
    gland_volume_range_ml=(25.0, 50.0),
    difficulty=0.3,
)

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
        settings = replace(PHANTOM, num_patients=max(arguments.sizes))
        write_phantom(folder / "all", settings=settings, seed=1)
        names = phantom_case_ids(settings)
        print(f"{len(names)} studies made in {time.monotonic() - started:.0f} s")
        print("studies  stage         CPU s     ms/study  peak MiB")
        for size in arguments.sizes:
            data = linked(folder / f"data{size}", folder / "all", names[:size])
            for stage in STAGES:
                seconds, mib = measured(stage, data=data, workspace=folder / f"workspace{size}")
                print(f"{size:7d}  {stage:<12} {seconds:8.1f} {1000 * seconds / size:9.1f} {mib:9.0f}", flush=True)


if __name__ == "__main__":
    main()
