"""Where a run came from: its commit, its DVC experiment, and the commands that make it again."""

from pathlib import Path

from mlflow.entities import Run

from prostate_seg.config.schema import MlflowConfig
from prostate_seg.tracking.commits import COMMITTED_IN, EXPERIMENT_COMMIT, experiments
from prostate_seg.tracking.recorded_runs import find_run, open_tree

DIFF, UNTRACKED = "git.diff", "git_untracked.txt"
"""Artifacts of a run: what git knew to be changed, and the files that it did not know."""


def origin_of(run_id: str, settings: MlflowConfig, *, cache: Path) -> list[str]:
    """Return lines for a person: what made the run, and how to make it again.

    Raises:
        InputError: If there is no such run, or the store cannot be used.
    """
    tree = open_tree(settings, cache=cache)
    run = find_run(tree, run_id)
    tags = run.data.tags
    artifacts = tree.store.call(lambda: tree.client.list_artifacts(run.info.run_id))
    files = {file.path for file in artifacts} & {DIFF, UNTRACKED}
    dirty = f" with changes that were not committed: artifact {' and '.join(sorted(files))}" if files else ""
    rows = {
        "run": f"{run.info.run_name} {run.info.run_id} {run.info.status} of {tags.get('pipeline')}",
        "started in": f"{tags.get('git.commit', 'no commit')}{dirty}",
        "command": tags.get("command"),
        "committed in": tags.get(COMMITTED_IN),
        "experiment": tags.get("dvc.experiment"),
        "its commit": tags.get(EXPERIMENT_COMMIT) or experiments().get(tags.get("dvc.experiment", "")),
        "baseline": tags.get("dvc.baseline"),
    }
    lines = [f"{name:<13} {value}" for name, value in rows.items() if value]
    return [*lines, "", "to make it again:", *(f"  {command}" for command in _commands(run, has_diff=DIFF in files))]


def _commands(run: Run, *, has_diff: bool) -> list[str]:
    """Return what to type in a clean clone that has the data."""
    tags = run.data.tags
    commits = tags.get(COMMITTED_IN, "").split()
    reproduce = f"python -m prostate_seg stage=reproduce reproduce.run={run.info.run_id}   # elsewhere, and compare"
    if tags.get("dvc.experiment") and not commits:
        return [f"dvc exp apply {tags['dvc.experiment']} && dvc repro --force --single-item {tags['stage']}", reproduce]
    if commits:
        checkout = f"git checkout {commits[-1]} && dvc checkout && dvc repro --force --single-item {tags['stage']}"
        return [checkout, reproduce]
    diff = (
        f"mlflow artifacts download --run-id {run.info.run_id} --artifact-path {DIFF} --dst-path . && git apply {DIFF}"
    )
    start = [f"git checkout {tags['git.commit']}"] if tags.get("git.commit") else []
    changed = [diff] if has_diff else []
    return [*start, *changed, tags.get("command", ""), reproduce]
