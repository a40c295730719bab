"""Kill stages at random moments with `kill -9`, repeat the commands, and compare with an uninterrupted run.

    python -m scripts.hard_use.kills --kills 100 --seed 1

A round runs all stages of a project; at random stages and moments, the stage is killed and started again. At the end every
output must equal that of the uninterrupted run byte for byte. Half of the rounds record runs in MLflow and register a model:
then no run may be left open, there must be one version, and DS_VERSION.json must contain the hashes of the files.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prostate_seg.common.files import md5_of, md5_of_text
from prostate_seg.stages import UNTRACKED_STAGES
from tests.project_helpers import Project

STAGES = ("fetch", "preprocess", "prepare", "train", "evaluate", "report", "predict")
RECORDED_STAGES = (*STAGES, "register")
"""Stages of a round with MLflow."""
OUTPUTS = ("data", "preprocess", "prepared", "model", "evaluation", "report", "predictions")
KILLS_PER_ROUND = 20
TRAINING = ("train.max_epochs=3", "train.steps_per_epoch=4")
"""Long enough that a kill often meets a checkpoint."""
OWN_SETTINGS = {"predict": ("predict.model=model", "predict.input=data/images")}

CHANGING = re.compile(
    r"<code title=\"[0-9a-f]{32}\">[0-9a-f]{10}</code>"
    r"|\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?|[0-9a-f]{32}|\d+(\.\d+)? (s|min|minutes|seconds)\b"
    rf"|<tr><th scope=\"row\">({'|'.join(STAGES)})</th>.*"
)
"""Times, run ids and hashes in a report, and its table of stages with their seconds: they differ between equal runs."""


@dataclass(slots=True)
class Round:
    """One pass through the stages."""

    project: Project
    recording: Sequence[str]
    """Overrides of the tracking store."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each stage without a kill."""
    num_kills: int = 0
    """Processes that were killed before they had finished."""

    def command(self, stage: str) -> list[str]:
        """Return the overrides of a stage."""
        return [f"stage={stage}", *TRAINING, *OWN_SETTINGS.get(stage, ()), *self.recording]

    def finish(self, stage: str) -> None:
        """Run a stage to its end."""
        started = time.monotonic()
        done = self.project.run(*self.command(stage))
        assert done.returncode == 0, f"{stage}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        self.seconds[stage] = time.monotonic() - started

    def kill(self, stage: str, *, after_seconds: float) -> None:
        """Start a stage and kill it after a while."""
        process = self.project.start(*self.command(stage))
        time.sleep(after_seconds)
        process.kill()
        process.communicate()
        self.num_kills += process.returncode < 0


def outputs_of(folder: Path) -> dict[str, str]:
    """Return the md5 of every output, without text that differs between equal runs."""
    found = {}
    for name in OUTPUTS:
        for path in sorted((folder / name).rglob("*")):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = _md5_of_reproducible_text(path, folder)
    return found


def _md5_of_reproducible_text(path: Path, folder: Path) -> str:
    """Return the md5 without times and ids of a report, and without the folder in pages and the records of predictions."""
    is_page = path.suffix in (".html", ".md")
    if not is_page and not (path.is_relative_to(folder / "predictions") and path.suffix in (".csv", ".json")):
        return md5_of(path)
    text = path.read_text(encoding="utf-8").replace(str(folder), "")
    return md5_of_text(CHANGING.sub("", text) if is_page else text)


def uninterrupted(folder: Path, *, recording: Sequence[str], stages: Sequence[str] = STAGES) -> Round:
    """Run the stages of a project without a kill."""
    folder.mkdir()
    whole = Round(Project(folder), recording)
    for stage in stages:
        whole.finish(stage)
    return whole


def interrupted(
    folder: Path, whole: Round, *, num_kills: int, rng: random.Random, stages: Sequence[str] = STAGES
) -> Round:
    """Run the stages of a project with `num_kills` kills, and compare the outputs at the end."""
    folder.mkdir()
    one = Round(Project(folder), whole.recording)
    weights = [whole.seconds[stage] for stage in stages]
    chosen = rng.choices(stages, weights, k=num_kills)
    for stage in stages:
        for _ in range(chosen.count(stage)):
            one.kill(stage, after_seconds=rng.uniform(0.2, 0.9) * whole.seconds[stage])
        one.finish(stage)
    require_same(outputs_of(folder), outputs_of(whole.project.folder))
    require_sound_record(one)
    return one


def require_same(found: dict[str, str], expected: dict[str, str]) -> None:
    """Fail with the names of the files that differ."""
    other = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    assert not other, f"outputs differ from the uninterrupted run's: {', '.join(other)}"


def require_sound_record(one: Round) -> None:
    """Fail unless the record can be read and no run is left open."""
    entries = json.loads((one.project.folder / "DS_VERSION.json").read_text())["stages"]
    recorded = one.seconds.keys() - UNTRACKED_STAGES
    assert recorded <= entries.keys(), sorted(entries)
    if "mlflow=off" not in one.recording:
        runs = one.project.runs()
        assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}, [run.info.status for run in runs]
        finished = [
            run.data.tags["stage"]
            for run in runs
            if run.data.tags["level"] == "stage" and run.info.status == "FINISHED"
        ]
        assert set(finished) == recorded, finished
        again = [stage for stage in finished if finished.count(stage) > 1]
        assert set(again) <= {"register"}, again  # killed after its run had ended; no registration replaces another
    if "register" in one.seconds:
        client = one.project.client
        assert len(client.search_model_versions("name = 'prostate_seg'")) == 1
        assert client.get_registered_model("prostate_seg").aliases.keys() == {"challenger"}


def main() -> None:
    """Run rounds until the number of kills is reached or exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng, started, killed, rounds = random.Random(arguments.seed), time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds: dict[str, tuple[list[str], Sequence[str]]] = {
            "off": (["mlflow=off"], STAGES),
            "on": ([], RECORDED_STAGES),
        }
        whole: dict[str, Round] = {}
        while killed < arguments.kills:
            kind = ("off", "on")[rounds % 2]
            recording, stages = kinds[kind]
            if kind not in whole:
                whole[kind] = uninterrupted(folder / f"whole_{kind}", recording=recording, stages=stages)
            # Always as many: on a machine that became faster some come after the end of the stage.
            one = interrupted(folder / str(rounds), whole[kind], num_kills=KILLS_PER_ROUND, rng=rng, stages=stages)
            killed, rounds = killed + one.num_kills, rounds + 1
            print(f"round {rounds}, mlflow {kind}: {one.num_kills} killed, outputs equal", flush=True)
    took = time.monotonic() - started
    print(f"{killed} kills in {rounds} rounds over {len(RECORDED_STAGES)} stages, all outputs equal; {took:.0f} s")
    sys.exit(0)


if __name__ == "__main__":
    main()
