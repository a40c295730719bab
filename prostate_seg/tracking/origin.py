"""Origin of a run as text: its commit, its DVC experiment, and the commands that repeat it."""

from pathlib import Path

from prostate_seg.config.schema import MlflowConfig
from prostate_seg.tracking.commits import COMMITTED_IN, EXPERIMENT_COMMIT, experiments
from prostate_seg.tracking.recorded_runs import find_run, open_tree

DIFF, UNTRACKED = "git.diff", "git_untracked.txt"
"""Artifacts of a run: changes of tracked files since the commit, and names of untracked files."""


def origin_of(run_id: str, settings: MlflowConfig, *, cache: Path) -> list[str]:
    """Return lines that name the origin of a run and the commands that repeat it in a clean clone with the data.

    Raises:
        InputError: If there is no such run, or the store cannot be used.
    """
    tree = open_tree(settings, cache=cache)
    run = find_run(tree, run_id)
    tags = run.data.tags
    artifacts = tree.store.call(lambda: tree.client.list_artifacts(run.info.run_id))
    files = {file.path for file in artifacts} & {DIFF, UNTRACKED}
    dirty = f" with changes that were not committed: artifact {' and '.join(sorted(files))}" if files else ""
    commits = tags.get(COMMITTED_IN, "").split()
    experiment = tags.get("dvc.experiment")
    rows = {
        "run": f"{run.info.run_name} {run.info.run_id} {run.info.status} of {tags.get('pipeline')}",
        "started in": f"{tags.get('git.commit', 'no commit')}{dirty}",
        "command": tags.get("command"),
        "committed in": tags.get(COMMITTED_IN),
        "experiment": experiment,
        "its commit": tags.get(EXPERIMENT_COMMIT) or experiments().get(experiment or ""),
        "baseline": tags.get("dvc.baseline"),
    }
    lines = [f"{name:<13} {value}" for name, value in rows.items() if value]

    repro = f"dvc repro --force --single-item {tags.get('stage')}"
    if commits:
        commands = [f"git checkout {commits[-1]} && dvc checkout && {repro}"]
    elif experiment:
        commands = [f"dvc exp apply {experiment} && {repro}"]
    else:
        download = f"mlflow artifacts download --run-id {run.info.run_id} --artifact-path {DIFF} --dst-path ."
        checkout = [f"git checkout {tags['git.commit']}"] if tags.get("git.commit") else []
        patch = [f"{download} && git apply {DIFF}"] if DIFF in files else []
        commands = [*checkout, *patch, tags.get("command", "")]
    commands.append(
        f"python -m prostate_seg stage=reproduce reproduce.run={run.info.run_id}   # elsewhere, and compare"
    )
    return [*lines, "", "to make it again:", *(f"  {command}" for command in commands)]
