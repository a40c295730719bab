"""How commits, DVC experiments and runs find each other: through the hashes in dvc.lock, which the runs carry as tags."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from mlflow.entities import Run

from prostate_seg.common.address import project_root
from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import STAGE_SETTINGS, MlflowConfig
from prostate_seg.provenance.git import GitError, git
from prostate_seg.tracking.recorded_runs import open_tree
from prostate_seg.tracking.records import Level
from prostate_seg.tracking.run_tree import RunTree
from prostate_seg.tracking.store import STORE_ERRORS, unusable

COMMITTED_IN = "committed_in"
"""Tag of a run: the commits whose dvc.lock holds its results, oldest first, separated by spaces."""
EXPERIMENT_COMMIT = "dvc.experiment_commit"
"""Tag of a run of a DVC experiment: the experiment's own commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A stage of a dvc.lock and the run that made its outputs."""

    stage: str
    run: Run | None
    """None when no run in the store wrote these outputs."""
    deleted: Run | None = None
    """In place of it, a run in MLflow's trash that did."""


def runs_of_commit(revision: str, settings: MlflowConfig, *, cache: Path) -> tuple[str, list[Match]]:
    """Return the commit that a revision or DVC experiment stands for, and the run behind each stage of its dvc.lock.

    Raises:
        InputError: If there is no such commit, it has no dvc.lock, or the store cannot be used.
    """
    commit = commit_of(revision)
    outputs = locked_outputs(commit)
    return commit, _matches(open_tree(settings, cache=cache), outputs)


def link_commit(revision: str, settings: MlflowConfig, *, cache: Path) -> tuple[str, list[Match]]:
    """Write a commit, or the commit of a DVC experiment, to the runs whose results its dvc.lock holds.

    Raises:
        InputError: As `runs_of_commit`.
    """
    commit = commit_of(revision)
    outputs = locked_outputs(commit)
    tree = open_tree(settings, cache=cache)
    matches = _matches(tree, outputs)
    named = git(project_root(), "for-each-ref", "--contains", commit, "refs/heads", "refs/tags", "refs/remotes")
    is_experiment = not named.strip()
    for match in matches:
        if match.run is None:
            continue
        if is_experiment:
            tree.client.set_tag(match.run.info.run_id, EXPERIMENT_COMMIT, commit)
            continue
        known = match.run.data.tags.get(COMMITTED_IN, "").split()
        if commit not in known:
            tree.client.set_tag(match.run.info.run_id, COMMITTED_IN, " ".join([*known, commit]))
    return commit, matches


def commit_of(revision: str) -> str:
    """Return the full hash of a commit, branch, tag or DVC experiment.

    Raises:
        InputError: If git knows none of that name, or refuses the repository.
    """
    if experiment := experiments().get(revision):
        return experiment
    try:
        return git(project_root(), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()
    except GitError as error:
        if error.code != 1:
            raise
        raise InputError(
            f"{revision}: git knows no commit, and DVC no experiment, of that name\nSee git log and dvc exp show."
        ) from error


def experiments() -> dict[str, str]:
    """Return the commit of every DVC experiment by its name; none where git refuses."""
    try:
        listing = git(project_root(), "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
    except GitError:
        return {}
    rows = re.findall(r"^(\w+) refs/exps/\w\w/\w+/(\S+)$", listing, re.MULTILINE)
    return {name: commit for commit, name in rows}


def locked_outputs(commit: str) -> dict[str, dict[str, str]]:
    """Return, by stage, the md5 of each output that the dvc.lock of a commit names.

    Raises:
        InputError: If the commit has none in the project's folder, which may lie below the repository's.
    """
    try:
        text = git(project_root(), "show", f"{commit}:./dvc.lock")
    except GitError as error:
        raise InputError(
            f"commit {commit[:12]} has no dvc.lock in {project_root()}\nRun dvc repro and commit dvc.lock ({error})."
        ) from error
    stages = yaml.safe_load(text).get("stages", {})
    return {
        name: {out["path"]: out["md5"] for out in stage.get("outs", [])}
        for name, stage in stages.items()
        if name in STAGE_SETTINGS
    }


def _matches(tree: RunTree, outputs: Mapping[str, Mapping[str, str]]) -> list[Match]:
    try:
        return [_match(tree, stage, md5s) for stage, md5s in outputs.items()]
    except STORE_ERRORS as error:
        raise InputError(unusable(tree.store.address, error)) from error


def _match(tree: RunTree, stage: str, md5s: Mapping[str, str]) -> Match:
    run = _run_with(tree, stage, md5s)
    deleted = _run_with(tree, stage, md5s, deleted=True) if run is None else None
    return Match(stage=stage, run=run, deleted=deleted)


def _run_with(tree: RunTree, stage: str, md5s: Mapping[str, str], *, deleted: bool = False) -> Run | None:
    """Return the newest run of the stage that wrote exactly these outputs."""
    wanted = {"stage": stage} | {f"md5.outputs/{path}": md5 for path, md5 in md5s.items()}
    runs = tree.search(filters=wanted, newest_first=True, deleted=deleted)
    found = [run for run in runs if "reused_from" not in run.data.tags]
    return next((run for run in found if run.data.tags.get("level") != Level.fold.value), None)
