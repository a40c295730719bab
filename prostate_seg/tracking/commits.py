"""Links between commits, DVC experiments and runs, found by the hashes in dvc.lock, which runs have as tags, and back."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from mlflow.entities import Run

from prostate_seg.common.address import project_root
from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import STAGE_SETTINGS, MlflowConfig
from prostate_seg.provenance.git import GitError, git
from prostate_seg.tracking.recorded_runs import find_run, open_tree
from prostate_seg.tracking.records import Level
from prostate_seg.tracking.store.run_tree import REUSED_FROM, RunTree, is_deleted

COMMITTED_IN = "committed_in"
"""Tag of a run: commits whose dvc.lock has its results, oldest first, separated by spaces."""
EXPERIMENT_COMMIT = "dvc.experiment_commit"
"""Tag of a run of a DVC experiment: commit of the experiment."""
DIFF, UNTRACKED = "git.diff", "git_untracked.txt"
"""Artifacts of a run: changes of tracked files since the commit, and names of untracked files."""


def runs_of_commit(revision: str, settings: MlflowConfig, *, cache: Path) -> tuple[str, dict[str, Run | None]]:
    """Return the commit of a revision or DVC experiment, and the run of each stage in its dvc.lock as `find_matches`.

    Raises:
        InputError: If there is no such commit, it has no dvc.lock, or the store cannot be used.
    """
    commit = commit_of(revision)
    outputs = locked_outputs(commit)  # before the store is opened: a wrong revision needs none
    return commit, find_matches(open_tree(settings, cache=cache), outputs)


def link_commit(revision: str, settings: MlflowConfig, *, cache: Path) -> tuple[str, dict[str, Run | None]]:
    """Tag the runs whose results a dvc.lock has with its commit, or with the commit of the DVC experiment."""
    commit, matches = runs_of_commit(revision, settings, cache=cache)
    store = open_tree(settings, cache=cache).store
    branches = git(project_root(), "for-each-ref", "--contains", commit, "refs/heads", "refs/tags", "refs/remotes")
    for run in (run for run in matches.values() if run is not None and not is_deleted(run)):
        if branches.strip():
            linked = dict.fromkeys([*run.data.tags.get(COMMITTED_IN, "").split(), commit])
            tag, value = COMMITTED_IN, " ".join(linked)
        else:  # the commit of an experiment is on no branch
            tag, value = EXPERIMENT_COMMIT, commit
        with store.explained_errors():
            store.client.set_tag(run.info.run_id, tag, value)
    return commit, matches


def commit_of(revision: str) -> str:
    """Return the full hash of a commit, branch, tag or DVC experiment.

    Raises:
        InputError: If there is none of that name, or git refuses the repository.
    """
    if experiment := experiments().get(revision):
        return experiment
    try:
        return git(project_root(), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()
    except GitError as error:
        if error.code != 1:
            raise InputError(f"{revision}: {error}\nRun this in the git repository that holds the commit.") from error
        raise InputError(
            f"{revision}: is the name of no commit in git, and of no experiment in DVC\nSee git log and dvc exp show."
        ) from error


def experiments() -> dict[str, str]:
    """Return the commit of each DVC experiment by name; empty if git refuses."""
    try:
        listing = git(project_root(), "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
    except GitError:
        return {}
    rows = re.findall(r"^(\w+) refs/exps/\w\w/\w+/(\S+)$", listing, re.MULTILINE)
    return {name: commit for commit, name in rows}


def locked_outputs(commit: str) -> dict[str, dict[str, str]]:
    """Return the md5 of each output in the dvc.lock of a commit, by stage and path.

    Raises:
        InputError: If the commit has no dvc.lock in the project's folder, which may be a subfolder of the repository, or
            the file cannot be read.
    """
    try:
        text = git(project_root(), "show", f"{commit}:./dvc.lock")
    except GitError as error:
        raise InputError(
            f"commit {commit[:12]} has no dvc.lock in {project_root()}\nRun dvc repro and commit dvc.lock ({error})."
        ) from error
    try:
        return {
            name: {out["path"]: out["md5"] for out in stage.get("outs", [])}
            for name, stage in yaml.safe_load(text).get("stages", {}).items()
            if name in STAGE_SETTINGS
        }
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        mark = getattr(error, "context_mark", None) or getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark else ""
        raise InputError(
            f"commit {commit[:12]}: dvc.lock{line} is not as DVC writes it ({getattr(error, 'problem', error)})\n"
            "Resolve a merge in it, run dvc repro, and commit dvc.lock; or name another commit."
        ) from error


def find_matches(tree: RunTree, outputs: Mapping[str, Mapping[str, str]]) -> dict[str, Run | None]:
    """Return for each stage the newest run that wrote exactly these outputs; a deleted one if there is no other."""
    matches = {}
    with tree.store.explained_errors():
        for stage, hashes in outputs.items():
            wanted = {"stage": stage} | {f"md5.outputs/{path}": md5 for path, md5 in hashes.items()}
            found = (tree.search(wanted, newest_first=True, deleted=deleted) for deleted in (False, True))
            own = (run for runs in found for run in runs if REUSED_FROM not in run.data.tags)
            matches[stage] = next((run for run in own if run.data.tags.get("level") != Level.fold), None)
    return matches


def match_line(run: Run | None) -> str:
    """Return the run of a stage as a line: id, status, pipeline."""
    if run is None:
        return "none in this store wrote these results"
    deleted = "  deleted: mlflow runs restore" if is_deleted(run) else ""
    return f"{run.info.run_id}  {run.info.status:<8}  {run.data.tags.get('pipeline', '')}{deleted}"


def origin_of(run_id: str, settings: MlflowConfig, *, cache: Path) -> list[str]:
    """Return lines that name the origin of a run and the commands that repeat it in a clean clone with the data.

    Raises:
        InputError: If there is no such run, or the store cannot be used.
    """
    tree = open_tree(settings, cache=cache)
    run = find_run(tree, run_id)
    artifacts = tree.store.call(lambda: tree.client.list_artifacts(run.info.run_id))
    changes = sorted({file.path for file in artifacts} & {DIFF, UNTRACKED})
    commands = _commands_for(run, has_diff=DIFF in changes)
    return [*_origin_of(run, changes), "", "to make it again:", *(f"  {command}" for command in commands)]


def _origin_of(run: Run, changes: Sequence[str]) -> list[str]:
    """Return lines with what is known of a run's code, given its artifacts with changes that were not committed."""
    tags = run.data.tags
    experiment = tags.get("dvc.experiment", "")
    dirty = f" with changes that were not committed: artifact {' and '.join(changes)}" if changes else ""
    rows = {
        "run": f"{run.info.run_name} {run.info.run_id} {run.info.status} of {tags.get('pipeline')}",
        "started in": f"{tags.get('git.commit', 'no commit')}{dirty}",
        "command": tags.get("command"),
        "committed in": tags.get(COMMITTED_IN),
        "experiment": experiment,
        "its commit": tags.get(EXPERIMENT_COMMIT) or experiments().get(experiment),
        "baseline": tags.get("dvc.baseline"),
    }
    return [f"{name:<13} {value}" for name, value in rows.items() if value]


def _commands_for(run: Run, *, has_diff: bool) -> list[str]:
    """Return the commands that repeat a run: with DVC if its results are committed, else from the commit it started in."""
    tags, run_id = run.data.tags, run.info.run_id
    repro = f"dvc repro --force --single-item {tags.get('stage')}"
    compared = f"python -m prostate_seg stage=reproduce reproduce.run={run_id}   # elsewhere, and compare"
    if commits := tags.get(COMMITTED_IN, "").split():
        return [f"git checkout {commits[-1]} && dvc checkout && {repro}", compared]
    if experiment := tags.get("dvc.experiment"):
        return [f"dvc exp apply {experiment} && {repro}", compared]
    download = f"mlflow artifacts download --run-id {run_id} --artifact-path {DIFF} --dst-path ."
    checkout = [f"git checkout {tags['git.commit']}"] if tags.get("git.commit") else []
    patch = [f"{download} && git apply {DIFF}"] if has_diff else []
    return [*checkout, *patch, tags.get("command", ""), compared]
