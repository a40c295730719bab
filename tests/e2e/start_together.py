"""Start eight processes at once on a store that does not exist yet, repeatedly, in a new folder each time.

Libraries are imported before the fork, so that the processes reach the store together. Prints one line per repetition.

    python start_together.py CONFIG TIMES
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import StageResult, workspace_of
from prostate_seg.operations.job import Job, Outcome
from prostate_seg.tracking.store.connection import MlflowClient
from prostate_seg.tracking.tracked_run import TrackedRun

NUM_PROCESSES = 8


def start_and_finish(config: Path, starting_at: float) -> None:
    cfg = parse(OmegaConf.load(config))  # type: ignore[arg-type]
    job = Job(overrides=(), output_dir=Path("log"), hydra_dir=".hydra", sweep_folder=None, number=None)
    time.sleep(max(0.0, starting_at - time.time()))
    run = TrackedRun(cfg, workspace_of(cfg), job)
    run.finish(StageResult(metrics={"x": 1.0}))
    run.close(Outcome.finished)


def once(config: Path) -> str:
    os.chdir(tempfile.mkdtemp())
    children = []
    starting_at = time.time() + 0.3
    for _ in range(NUM_PROCESSES):
        child = os.fork()
        if child == 0:
            try:
                start_and_finish(config, starting_at)
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"{error!r}\n")
                os._exit(1)
        children.append(child)
    failures = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlflow.db")
    experiments = [one for one in client.search_experiments() if one.name != "Default"]
    runs = client.search_runs([one.experiment_id for one in experiments])
    parents = [run for run in runs if run.data.tags["level"] == "pipeline"]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    finished = [run for run in runs if run.info.status == "FINISHED"]
    return (
        f"experiments {len(experiments)} parents {len(parents)} children {len(below)} finished {len(finished)} "
        f"errors {failures}"
    )


if __name__ == "__main__":
    for _ in range(int(sys.argv[2])):
        print(once(Path(sys.argv[1])), flush=True)  # noqa: T201
