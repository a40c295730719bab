"""Repeats a recorded stage in a temporary folder with the code, settings and inputs of its run, and nothing else."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Run

from prostate_seg.common.address import project_root
from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.files import read_json
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance import dvc_cache
from prostate_seg.provenance.git import git, git_succeeds
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.provenance.record import path_of
from prostate_seg.provenance.source_files import PACKAGE
from prostate_seg.tracking.commits import COMMITTED_IN, DIFF, EXPERIMENT_COMMIT
from prostate_seg.tracking.recorded_runs import artifact_text, find_run, open_tree, recorded_stages
from prostate_seg.tracking.store.run_tree import RunTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """Result of repeating a stage."""

    stage: str
    code: str
    """Source of its code: a commit, or the installed package."""
    outputs: Mapping[str, tuple[str, str | None]]
    """Recorded and new md5 of each output."""
    metrics: Mapping[str, tuple[float, float | None]]
    """Recorded and new value of each metric."""


def reproduce(run_id: str, settings: MlflowConfig, *, workspace: Workspace) -> Reproduction:
    """Repeat the stage of a run in a temporary folder, with tracking off.

    Raises:
        InputError: If the run is not of one stage, its code or an input cannot be restored, or the stage fails.
    """
    tree = open_tree(settings, cache=workspace.cache)
    run = find_run(tree, run_id)
    stages = recorded_stages(tree, run_id)
    if len(stages) != 1:
        raise InputError(f"run {run_id} holds {len(stages)} stages: name the run of one, such as train")
    stage, record = stages[0]
    with (
        tempfile.TemporaryDirectory(prefix="prostate_seg-") as name,
        _code(tree, run, record, workspace, Path(name)) as (folder, source),
    ):
        for key, md5 in record["inputs"].items():
            _restore_input(key, md5, folder, workspace, data=record["settings"]["data"]["root"])
        # the inputs are in the workspace now, also those of a data folder that the run named
        recorded = {**record["settings"], "data": {**record["settings"]["data"], "root": None}}
        if stage == "train" and recorded["train"].get("init") is not None:
            recorded["train"] = {**recorded["train"], "init": str(_initial_weights(record, folder))}
        (folder / "params.yaml").write_text(yaml.safe_dump(recorded), encoding="utf-8")
        _run(stage, folder)
        made = read_json(folder / "DS_VERSION.json")["stages"]
        entry = next(value for key, value in made.items() if key.split(".")[0] == stage)
    return Reproduction(
        stage=stage,
        code=source,
        outputs={key: (md5, entry["outputs"].get(key)) for key, md5 in record["outputs"].items()},
        metrics={key: (value, entry["metrics"].get(key)) for key, value in record["metrics"].items()},
    )


@contextlib.contextmanager
def _code(
    tree: RunTree, run: Run, record: Mapping[str, Any], workspace: Workspace, folder: Path
) -> Iterator[tuple[Path, str]]:
    """Yield a folder with the recorded source files, and their source."""
    tags, started_in, recorded = run.data.tags, record["git"]["commit"], record["code"]
    diff = artifact_text(tree, run, DIFF) if record["git"]["is_dirty"] else None
    later = [*tags.get(COMMITTED_IN, "").split(), tags.get(EXPERIMENT_COMMIT)]
    candidates = dict.fromkeys([(started_in, diff), *((commit, None) for commit in (started_in, *later))])
    different: list[str] = []
    for number, (commit, patch) in enumerate(candidates):
        with _checkout(commit, patch, folder / f"code{number}") as checkout:
            if checkout is not None and not (different := _different_code(recorded, checkout, workspace)):
                yield checkout, f"commit {commit[:12]}" + (" and git.diff" if patch else "")
                return
    if different_here := _different_code(recorded, PACKAGE.parent, workspace):
        different = different or different_here
        raise InputError(
            f"the code of run {run.info.run_id} cannot be restored from its commit: {len(different)} files differ: "
            f"{listed(different)}\n"
            "It ran on changes that were in no commit and in no git.diff."
        )
    here = folder / "here"
    here.mkdir()
    yield here, "the installed package, which is the same"


@contextlib.contextmanager
def _checkout(commit: str | None, patch: str | None, folder: Path) -> Iterator[Path | None]:
    """Yield the project's folder in a checkout of a commit with a patch; None if git refuses one of the two."""
    add = ("worktree", "add", "--detach", "--quiet", str(folder), str(commit))
    if not commit or not git_succeeds(project_root(), *add):
        yield None
        return
    try:  # the project may be a subfolder of its repository
        below = git(project_root(), "rev-parse", "--show-prefix").strip()
        yield folder / below if patch is None or apply_diff(patch, folder) else None
    finally:
        git_succeeds(project_root(), "worktree", "remove", "--force", str(folder))


def apply_diff(diff: str, checkout: Path) -> bool:
    """Apply a recorded diff to a checkout; return False, and change nothing, if git refuses it."""
    return git_succeeds(checkout, "apply", "--whitespace=nowarn", "-", stdin=diff)


def _different_code(recorded: Mapping[str, str], root: Path, workspace: Workspace) -> list[str]:
    """Return the recorded source files that differ below `root`."""
    there = {key: root / key for key in recorded if (root / key).is_file()}
    hashed = hash_paths(there.values(), cache=workspace.cache)
    return [key for key, md5 in recorded.items() if key not in there or hashed[there[key]].md5 != md5]


def _restore_input(key: str, md5: str, folder: Path, workspace: Workspace, *, data: str | None) -> None:
    """Put an input into the temporary workspace: from this one or the run's data folder if unchanged, else from DVC."""
    if ".." in Path(key).parts:  # records in a store are not trusted
        raise InputError(f"the run names the input {key}, which leads out of its workspace: nothing is put there")
    target = folder / key
    paths = [path_of(key, one) for one in (workspace, replace(workspace, data=Path(data or workspace.data)))]
    hashed = hash_paths(filter(Path.exists, paths), cache=workspace.cache)
    source = next((path for path, found in hashed.items() if found.md5 == md5), None)
    if Path(key).is_absolute():
        if source is None:
            raise InputError(f"{key} is not what the run read; it lies outside of the workspace, so put it back there")
        return
    if source is None:
        dvc_cache.restore(md5, target)
        return
    source = source.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:  # Windows often allows no links
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, target)


def _initial_weights(record: Mapping[str, Any], folder: Path) -> Path:
    """Return the folder of the networks that a training started from, among its restored inputs; an alias can have moved."""
    found = [folder / key for key in record["inputs"] if key.split("/")[0] not in ("preprocess", "prepared")]
    return found[0] if len(found) == 1 else found[0].parent


def _run(stage: str, folder: Path) -> None:
    code = folder if (folder / PACKAGE.name).is_dir() else PACKAGE.parent
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "PROSTATE_SEG_"))}
    command = [sys.executable, "-m", PACKAGE.name, "--config-name", "from_params", f"stage={stage}", "mlflow=off"]
    done = subprocess.run(command, cwd=folder, env=kept | {"PYTHONPATH": str(code)}, check=False)
    if done.returncode != 0:
        raise InputError(f"{stage} failed when it was run again (exit code {done.returncode}); its output is above")
