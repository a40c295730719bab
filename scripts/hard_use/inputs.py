"""Run a stage on corrupted studies: each must be refused with a message or give a complete result, within limits.

    python -m scripts.hard_use.inputs --count 1000 --seed 1                    # preprocess
    python -m scripts.hard_use.inputs --count 1000 --seed 1 --stage predict    # with a network trained for it within a minute

An action is a function of a mutant and an empty folder: it writes there, or raises InputError. It runs in a separate process,
so that hangs and crashes are detected.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from prostate_seg.common.errors import InputError
from scripts.hard_use.mutants import Mutant, make_healthy, mutants

LONGEST_SECONDS = 30.0
"""A study that takes longer counts as a hang."""
MOST_MIB = 1024
"""Limit of the additional memory for a study of a megabyte."""

Action = Callable[[Mutant, Path], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Outcome of an action on a mutant."""

    mutant: Mutant
    outcome: str
    """accepted, refused, traceback, hang, crash, memory or left output."""
    text: str
    seconds: float
    peak_mib: float
    """Additional memory; 0 on systems without /proc."""

    @property
    def is_good(self) -> bool:
        """Return whether the outcome is acceptable."""
        return self.outcome in ("accepted", "refused")


def survey(action: Action, made: Iterable[Mutant], *, outputs: Path) -> list[Verdict]:
    """Try an action, which can be pickled, on each mutant."""
    worker = _Worker(action)
    try:
        return [_tried(worker, mutant, outputs / f"{mutant.number:04d}") for mutant in made]
    finally:
        worker.end()


def try_here(action: Action, mutant: Mutant, out: Path) -> tuple[str, str]:
    """Run an action in this process; return the outcome and the message."""
    out.mkdir(parents=True)
    try:
        action(mutant, out)
    except InputError as error:
        left = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
        if "The others are done." in str(error):  # the input held another study, which is whole
            return "refused", str(error)
        return ("left output", ", ".join(left)) if left else ("refused", str(error))
    except Exception:
        return "traceback", traceback.format_exc()
    return "accepted", ""


def _tried(worker: "_Worker", mutant: Mutant, out: Path) -> Verdict:
    started = time.monotonic()
    outcome, text, peak_mib = worker.run(mutant, out)
    shutil.rmtree(out, ignore_errors=True)
    if outcome in ("accepted", "refused") and peak_mib > MOST_MIB:
        outcome, text = "memory", f"{peak_mib:.0f} MiB; {text}"
    seconds = time.monotonic() - started
    if outcome not in ("accepted", "refused"):
        print(f"BAD {mutant.number} {mutant.what}: {outcome}\n{text}", flush=True)
    return Verdict(mutant=mutant, outcome=outcome, text=text, seconds=seconds, peak_mib=peak_mib)


class _Worker:
    """A process that tries mutants; one that hangs or dies is replaced."""

    def __init__(self, action: Action) -> None:
        self.action = action
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.action), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # libraries are imported: time is measured from now on

    def run(self, mutant: Mutant, out: Path) -> tuple[str, str, float]:
        self.pipe.send((mutant, out))
        try:
            if self.pipe.poll(LONGEST_SECONDS):
                answer: tuple[str, str, float] = self.pipe.recv()
                return answer
            outcome = ("hang", f"no answer within {LONGEST_SECONDS:.0f} s", 0.0)
        except EOFError:
            self.process.join()
            outcome = ("crash", f"exit code {self.process.exitcode}", 0.0)
        self.end()
        self._start()
        return outcome

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, action: Action) -> None:
    """Main loop of the process that tries mutants."""
    import logging

    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # output of ITK, which the messages repeat
    with tempfile.TemporaryDirectory() as folder:  # a healthy study first, which imports all libraries
        make_healthy(Path(folder) / "healthy")
        healthy = Path(folder) / "healthy"
        image, mask = healthy / "images/1_1.nii.gz", healthy / "masks/1_1.nii.gz"
        for kind in ("images", "masks"):
            for other in (healthy / kind).iterdir():
                if other not in (image, mask):
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
        outcome, text = try_here(action, Mutant(number=0, what="healthy", image=image, mask=mask), Path(folder) / "out")
        assert outcome == "accepted", text
    pipe.send("ready")
    while True:
        mutant, out = pipe.recv()
        before = _memory_mib("VmRSS", is_reset=True)
        outcome, text = try_here(action, mutant, out)
        pipe.send((outcome, text, _memory_mib("VmHWM") - before))


def _memory_mib(name: str, *, is_reset: bool = False) -> float:
    """Return a value of /proc/self/status, 0 without it; `is_reset` first resets the peak to the current value."""
    if not sys.platform.startswith("linux"):
        return 0.0
    if is_reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:")) / 1024


def preprocess(mutant: Mutant, out: Path) -> None:
    """Preprocess a mutant beside a healthy study and exclude bad cases; outputs must be complete.

    Raises:
        InputError: If the mutant was excluded, with its findings.
    """
    from hydra import compose, initialize_config_dir

    from prostate_seg.cli import config_folder
    from prostate_seg.config.schema import parse
    from prostate_seg.config.workspace import workspace_of
    from prostate_seg.imaging.image_io import read_volume
    from prostate_seg.stages import preprocess as stage

    root = mutant.image.parents[1]
    _add_healthy(root)
    overrides = [f"data.root='{root}'", f"paths.root='{out}'", "machine.num_workers=1"]
    with initialize_config_dir(config_dir=str(config_folder())):
        composed = compose(
            "config", overrides=["data=folder", "data.on_bad_case=exclude", "preprocess.image_size=64", *overrides]
        )
    cfg = parse(composed)
    workspace = workspace_of(cfg)
    stage.run(cfg, workspace)
    from prostate_seg.data.dataset import read_dataset

    kept = read_dataset(workspace.dataset_csv)
    written = {kind: {path.name for path in (workspace.preprocess / kind).iterdir()} for kind in ("images", "masks")}
    for case_id in kept:
        for kind in written:
            assert read_volume(workspace.preprocess / kind / f"{case_id}.nii.gz").array.max() > 0
    assert all(names == {f"{case_id}.nii.gz" for case_id in kept} for names in written.values()), written
    assert HEALTHY_ID in kept
    log = json.loads((workspace.preprocess / "preprocess_log.json").read_text())
    if len(kept) == 1:
        said = [f"{one['check']}: {one['message']}" for one in log["findings"]]
        shutil.rmtree(out)
        raise InputError("\n".join(said))


def make_networks(folder: Path) -> Path:
    """Train a network on phantoms for a minute at most; return the folder of the model."""
    settings = ["experiment=tiny", "fold.index=0", "data.phantom.num_patients=4", "mlflow=off", f"paths.root={folder}"]
    command = [sys.executable, "-m", "prostate_seg", "-m", "stage=fetch,preprocess,prepare,train", *settings]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "model"


def predict(mutant: Mutant, out: Path, *, model: Path) -> None:
    """Segment the image of a mutant; if it is refused, the table with the reason must be the only output.

    Raises:
        InputError: If it is refused.
    """
    from hydra import compose, initialize_config_dir

    from prostate_seg.cli import config_folder
    from prostate_seg.config.schema import parse
    from prostate_seg.config.workspace import workspace_of
    from prostate_seg.stages import predict as stage

    with initialize_config_dir(config_dir=str(config_folder())):
        cfg = parse(compose("config", overrides=["stage=predict", "mlflow=off", "machine.num_workers=1"]))
    arguments = replace(cfg.predict, input=str(mutant.image), output=str(out / "predictions"), model=str(model))
    cfg = replace(cfg, paths=replace(cfg.paths, root=str(out)), predict=arguments)
    try:
        stage.run(cfg, workspace_of(cfg))
    except InputError:
        (out / "predictions" / "volumes.csv").unlink(missing_ok=True)
        raise
    assert any((out / "predictions" / "masks").iterdir())


HEALTHY_ID = "9_9"


def _add_healthy(root: Path) -> None:
    """Add a healthy study to the data of the mutant."""
    with tempfile.TemporaryDirectory() as folder:
        make_healthy(Path(folder) / "healthy")
        for kind in ("images", "masks"):
            shutil.copy(Path(folder) / "healthy" / kind / "1_1.nii.gz", root / kind / f"{HEALTHY_ID}.nii.gz")


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Return a summary in lines: counts, the slowest and the largest."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    slowest = max(verdicts, key=lambda verdict: verdict.seconds)
    largest = max(verdicts, key=lambda verdict: verdict.peak_mib)
    return [
        f"{len(verdicts)} corrupted inputs: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()),
        f"slowest {slowest.seconds:.1f} s ({slowest.mutant.what}), largest {largest.peak_mib:.0f} MiB ({largest.mutant.what})",
    ]


def main() -> None:
    """Run a stage on corrupted studies; exit code 1 if an outcome is not acceptable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="number of the one mutant to try")
    parser.add_argument("--stage", choices=["preprocess", "predict"], default="preprocess")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        action: Action = preprocess
        if arguments.stage == "predict":
            action = partial(predict, model=make_networks(Path(folder) / "networks"))
        made = mutants(Path(folder) / "mutants", seed=arguments.seed, count=arguments.count)
        chosen = (mutant for mutant in made if arguments.only in (None, mutant.number))
        verdicts = survey(action, chosen, outputs=Path(folder) / "outputs")
    print("\n".join(table(verdicts)))
    sys.exit(0 if all(verdict.is_good for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
