"""Scaling of time and memory with the data set: preprocess, prepare and one training epoch on 500, 1000 and 2000 studies.

    python -m scripts.hard_use.growth --sizes 500 1000 2000

The studies are phantoms of 100 mm, one per patient. Time is CPU time of one thread, which does not depend on the load of the
machine; memory is the peak of the process, including pages of mapped files.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.project_helpers import clean_environment

PHANTOM = (
    "data=phantom",
    "data.phantom.num_second_studies=0",
    "data.phantom.field_of_view_mm=100",
    "data.phantom.num_slices_range=[10,12]",
    "data.phantom.gland_volume_range_ml=[25,50]",
    "mlflow=off",
)
SETTINGS = (
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


def linked(folder: Path, source: Path, size: int) -> Path:
    """Return a folder with links to the first studies."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for path in sorted((source / kind).iterdir())[:size]:
            (folder / kind / path.name).symlink_to(path)
    return folder


def measured(stage: str, *arguments: str, workspace: Path) -> tuple[float, float]:
    """Return CPU seconds and peak MiB of a stage; the peak is at least that of this process when it started the stage."""
    command = [sys.executable, "-m", "prostate_seg", f"stage={stage}", *arguments]
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
        print("studies  stage         CPU s     ms/study  peak MiB")

        def show(size: int, stage: str, *settings: str, workspace: Path) -> None:
            seconds, mib = measured(stage, *settings, workspace=workspace)
            print(f"{size:7d}  {stage:<12} {seconds:8.1f} {1000 * seconds / size:9.1f} {mib:9.0f}", flush=True)

        largest = max(arguments.sizes)
        show(largest, "fetch", *PHANTOM, f"data.phantom.num_patients={largest}", workspace=folder / "phantom")
        for size in arguments.sizes:
            data = linked(folder / f"data{size}", folder / "phantom" / "data", size)
            for stage in STAGES:
                show(size, stage, "data=folder", f"data.root={data}", *SETTINGS, workspace=folder / f"workspace{size}")


if __name__ == "__main__":
    main()
