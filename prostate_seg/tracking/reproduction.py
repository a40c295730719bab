"""Running a recorded stage again, elsewhere: its code, its settings, its inputs, nothing of what lies around here."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from prostate_seg.common.address import project_root
from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance import dvc_cache
from prostate_seg.provenance.git import GitError, git
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.provenance.record import path_of
from prostate_seg.provenance.source_files import PACKAGE
from prostate_seg.tracking.commits import COMMITTED_IN, EXPERIMENT_COMMIT
from prostate_seg.tracking.recorded_runs import artifact_text, find_run, open_tree, recorded_stages
from prostate_seg.tracking.run_tree import RunTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """What came of running a stage again."""

    stage: str
    code: str
    """Where its code came from."""
    outputs: Mapping[str, tuple[str, str | None]]
    """Recorded and new md5 of each output."""
    metrics: Mapping[str, tuple[float, float | None]]
    """Recorded and new value of each metric."""

    @property
    def is_identical(self) -> bool:
        """Whether every output has the recorded hash."""
        return all(old == new for old, new in self.outputs.values())

    def agrees_within(self, tolerance: float) -> bool:
        """Return whether no metric is further from its recorded value than this part of it."""
        return all(new is not None and abs(new - old) <= tolerance * abs(old) for old, new in self.metrics.values())


def reproduce(run_id: str, settings: MlflowConfig, *, workspace: Workspace) -> Reproduction:
    """Run the stage of a run again in a temporary folder, with tracking off.

    Raises:
        InputError: If the run is not that of one stage, or its code or an input cannot be restored, or the stage fails.
    """
    tree = open_tree(settings, cache=workspace.cache)
    run_id = str(find_run(tree, run_id).info.run_id)
    stages = recorded_stages(tree, run_id)
    if len(stages) != 1:
        raise InputError(f"run {run_id} holds {len(stages)} stages: name the run of one, such as train")
    stage, record = stages[0]
    with (
        tempfile.TemporaryDirectory(prefix="prostate_seg-") as name,
        _code(tree, run_id, record, workspace, Path(name)) as (folder, source),
    ):
        for key, md5 in record["inputs"].items():
            _restore_input(key, md5, folder, _places(key, record, workspace), cache=workspace.cache)
        (folder / "params.yaml").write_text(yaml.safe_dump(_settings(record)), encoding="utf-8")
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
    tree: RunTree, run_id: str, record: Mapping[str, Any], workspace: Workspace, folder: Path
) -> Iterator[tuple[Path, str]]:
    """Yield a folder with the run's own source files, and where they came from."""
    tags = find_run(tree, run_id).data.tags
    started_in = record["git"]["commit"]
    diff = artifact_text(tree, run_id, "git.diff") if record["git"]["is_dirty"] else None
    candidates = [(started_in, diff), (started_in, None)]
    candidates += [(commit, None) for commit in [*tags.get(COMMITTED_IN, "").split(), tags.get(EXPERIMENT_COMMIT)]]
    different: list[str] = []
    below = _folder_in_repository()
    for number, (commit, patch) in enumerate(candidates):
        if not commit:
            continue
        checkout = folder / f"code{number}"
        if not _succeeds(project_root(), "worktree", "add", "--detach", "--quiet", str(checkout), commit):
            continue
        project = checkout / below
        try:
            patched = patch is None or _apply(patch, checkout)
            different = _different_code(record["code"], project, workspace)
            if patched and not different:
                yield project, f"commit {commit[:12]}" + (" and git.diff" if patch else "")
                return
        finally:
            _succeeds(project_root(), "worktree", "remove", "--force", str(checkout))
    here = folder / "here"
    here.mkdir()
    different_here = _different_code(record["code"], PACKAGE.parent, workspace)
    if different_here:
        different = different or different_here
        listing = ", ".join(different[:5]) + (" ..." if len(different) > 5 else "")
        raise InputError(
            f"the code of run {run_id} cannot be restored from its commit: {len(different)} files differ ({listing})\n"
            "It ran on changes that were in no commit and in no git.diff."
        )
    yield here, "the installed package, which is the same"


def _different_code(recorded: Mapping[str, str], root: Path, workspace: Workspace) -> list[str]:
    """Return the recorded source files that are not the same below `root`."""
    there = {key: root / key for key in recorded if (root / key).is_file()}
    hashed = hash_paths(there.values(), cache=workspace.cache)
    return [key for key, md5 in recorded.items() if key not in there or hashed[there[key]].md5 != md5]


def _places(key: str, record: Mapping[str, Any], workspace: Workspace) -> list[Path]:
    """Return where an input may lie on this machine."""
    there = [path_of(key, workspace)]
    root = record["settings"]["data"]["root"]
    if root is not None:  # the data folder that the run named
        there.append(path_of(key, replace(workspace, data=Path(root))))
    return [path for path in there if path.exists()]


def _restore_input(key: str, md5: str, folder: Path, places: Sequence[Path], *, cache: Path) -> None:
    """Put an input where the stage will look: from here if it is still the same, else from DVC."""
    if ".." in Path(key).parts:  # what a store says is not believed
        raise InputError(f"the run names the input {key}, which leads out of its workspace: nothing is put there")
    target = folder / key
    here = next((path for path in places if hash_paths([path], cache=cache)[path].md5 == md5), None)
    if Path(key).is_absolute():
        if here is None:
            raise InputError(f"{key} is not what the run read; it lies outside of the workspace, so put it back there")
    elif here is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(here.absolute(), target)
    else:
        dvc_cache.restore(md5, target)


def _link_or_copy(source: Path, target: Path) -> None:
    """Link where the system lets this user do so, which Windows often does not."""
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings; data lie where `_restore_input` puts them."""
    return {**record["settings"], "data": {**record["settings"]["data"], "root": None}}


def _run(stage: str, folder: Path) -> None:
    code = folder if (folder / PACKAGE.name).is_dir() else PACKAGE.parent
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_", "PROSTATE_SEG_"))}
    command = [sys.executable, "-m", PACKAGE.name, "--config-name", "from_params", f"stage={stage}", "mlflow=off"]
    done = subprocess.run(command, cwd=folder, env=kept | {"PYTHONPATH": str(code)}, check=False)
    if done.returncode != 0:
        raise InputError(f"{stage} failed when it was run again (exit code {done.returncode}); its words are above")


def _folder_in_repository() -> str:
    """Return where the project lies inside of its repository: empty at the top, or where there is none."""
    try:
        return git(project_root(), "rev-parse", "--show-prefix").strip()
    except GitError:
        return ""


def _apply(patch: str, checkout: Path) -> bool:
    return _succeeds(checkout, "apply", "--whitespace=nowarn", "-", stdin=patch)


def _succeeds(folder: Path, *arguments: str, stdin: str | None = None) -> bool:
    try:
        git(folder, *arguments, stdin=stdin)
    except GitError:
        return False
    return True
