"""Model registry: registers evaluated networks as versions of an MLflow model, and moves the aliases of its versions.

A version holds a folder of networks with their evaluation, and the code that loads them; nothing in it is pickled. The alias
challenger is the newest version, champion the promoted one; each move is recorded as a tag of the registered model. A store
that cannot be used is an InputError in every function.
"""

import json
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from prostate_seg.common.address import REGISTRY
from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder, atomic_path
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.job import Outcome
from prostate_seg.operations.process import user_name
from prostate_seg.provenance import dvc_cache
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.provenance.record import path_of
from prostate_seg.provenance.source_files import PACKAGE, files_behind, packages_behind
from prostate_seg.tracking.recorded_runs import artifact_text, find_run, open_tree, provenance_of, stage_of
from prostate_seg.tracking.records import Level
from prostate_seg.tracking.store.connection import ABSENT
from prostate_seg.tracking.store.run_tree import MAX_CANDIDATES, PARENT, RunTree, source_of

CHAMPION, CHALLENGER = "champion", "challenger"
NETWORKS = "networks"
"""Name of the folder of networks inside a registered model."""
LOADER = "segmentation/networks/pyfunc.py"
"""Module of this package with which MLflow loads a model."""
LONGEST_REASON = 2000
"""Characters of the reason for a move: the tag that holds it may have 5,000 in every database of MLflow."""
TABLES = ("cases.csv", "slices.csv", "metrics.json")

INPUTS = {"path": DataType.string, "content": DataType.binary}
OUTPUTS = {
    "mask": DataType.string,
    "volume_ml": DataType.double,
    "num_slices": DataType.long,
    "mean_confidence": DataType.double,
    "fold_agreement": DataType.double,
    "warnings": DataType.string,
    "error": DataType.string,
    "zones": DataType.string,
    "expected_dice": DataType.double,
    "dice_lower_bound": DataType.double,
}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(kind, name, required=False) for name, kind in INPUTS.items()]),
    outputs=Schema([ColSpec(kind, name, required=False) for name, kind in OUTPUTS.items()]),
)
"""Inputs and outputs of `segmentation.networks.pyfunc`."""

DESCRIPTION = "Prostate gland on T2-weighted MRI, whole or with zones. champion passed the gate; challenger is newest."


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """An evaluation of networks, from the tracking store."""

    run_id: str
    pipeline: str
    record: Mapping[str, Any]
    """Its provenance.json."""
    tables: Mapping[str, str]
    """Texts of its cases.csv, slices.csv and metrics.json."""

    @property
    def summary(self) -> dict[str, Any]:
        """Content of its metrics.json."""
        return dict(json.loads(self.tables["metrics.json"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version of a registered model."""

    name: str
    number: str
    model_id: str
    """Id of the logged model; its files never change."""
    tags: Mapping[str, str]

    @classmethod
    def of(cls, found: ModelVersion) -> "Version":
        """Return a version as MLflow gives it; its source is models:/ID."""
        model_id = str(found.source).rpartition("/")[2]
        return cls(name=str(found.name), number=str(found.version), model_id=model_id, tags=dict(found.tags))

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"

    @property
    def trained_by(self) -> str:
        """Ids of the runs that trained its networks, joined by commas; none if they are not known."""
        return self.tags.get("training_run_ids", "none")


def evaluated_run(tree: RunTree, run_id: str | None, *, pipeline: str) -> Evaluated:
    """Return an evaluation, by its run, a training or fold that it tested, or its pipeline; else the newest of the pipeline.

    Raises:
        InputError: If there is none, or it has not finished.
    """
    with tree.store.explained_errors():
        run = _evaluation(tree, _named_pipeline(tree, pipeline) if run_id is None else find_run(tree, run_id))
        record = provenance_of(tree, run)
        texts = {name: artifact_text(tree, run, f"tables/{name}") for name in TABLES}
    tables = {name: text for name, text in texts.items() if text is not None}
    if missing := [name for name in TABLES if name not in tables]:
        raise InputError(
            f"run {source_of(run)} holds no {', '.join(missing)}: run stage=evaluate again, then stage=register"
        )
    return Evaluated(run_id=source_of(run), pipeline=str(run.data.tags["pipeline"]), record=record, tables=tables)


def _named_pipeline(tree: RunTree, name: str) -> Run:
    """Return the newest pipeline of that name that holds other stages than register."""
    found = tree.search({"level": Level.pipeline, "pipeline": name}, newest_first=True, limit=MAX_CANDIDATES)
    for run in found:
        if any(one.data.tags.get("stage") != "register" for one in tree.children(run.info.run_id)):
            return run
    deleted = tree.deleted_by_hand(pipeline=name, level=Level.pipeline)
    if deleted:
        raise InputError(f"pipeline {name}: {tree.how_to_restore(deleted[0])}")
    if not found:
        raise InputError(f"there is no pipeline {name} in {tree.store.address}: set mlflow.name, or register.run=ID")
    return found[0]


def _evaluation(tree: RunTree, run: Run) -> Run:
    """Return the run itself, or the newest finished evaluation of a pipeline, training or fold."""
    if run.data.tags.get("stage") == "evaluate":
        if run.info.status != Outcome.finished:
            raise InputError(f"run {run.info.run_id} has not finished ({run.info.status}): run stage=evaluate again")
        return run
    run = stage_of(tree, run)
    named = f"run {run.info.run_id} ({run.info.run_name})"
    is_pipeline = run.data.tags.get("level") == Level.pipeline
    if not is_pipeline and run.data.tags.get("stage") != "train":
        raise InputError(
            f"register.run: {named} is neither an evaluation, nor a training or a pipeline that has one\n"
            "The MLflow page and stage=find show the ids of runs."
        )
    pipeline_id = run.info.run_id if is_pipeline else run.data.tags[PARENT]

    def is_wanted(evaluation: Run) -> bool:
        tested = {value for key, value in evaluation.data.tags.items() if key.startswith("previous_run_id.train")}
        return is_pipeline or run.info.run_id in tested

    finished = tree.children(pipeline_id, status=Outcome.finished, stage="evaluate", level=Level.stage)
    if evaluations := list(filter(is_wanted, finished)):
        return evaluations[-1]
    if deleted := list(filter(is_wanted, tree.deleted_by_hand(**{PARENT: pipeline_id, "stage": "evaluate"}))):
        raise InputError(f"the evaluation of {named}: {tree.how_to_restore(deleted[0])}")
    raise InputError(f"the networks of {named} have not been tested: run stage=evaluate first, then stage=register")


def training_runs(evaluated: Evaluated) -> list[str]:
    """Return the ids of the runs that trained the tested networks; of unchanged, recorded networks only."""
    upstream: Mapping[str, Mapping[str, Any]] = evaluated.record["upstream"]
    ids = {one["run_id"] for name, one in upstream.items() if name.split(".")[0] == "train" and one["unchanged"]}
    return sorted(str(run_id) for run_id in ids if run_id)


def tested_networks(evaluated: Evaluated, workspace: Workspace, *, otherwise: Path) -> Path:
    """Return the folder of the networks that an evaluation tested: in the workspace if unchanged, else restored by DVC.

    Raises:
        InputError: If they are in neither.
    """
    key, md5 = next((key, md5) for key, md5 in evaluated.record["inputs"].items() if Path(key).name == "model")
    for path in (path_of(key, workspace), workspace.model):
        if _md5(path, cache=workspace.cache) == md5:
            return path
    return _restored(
        md5,
        otherwise,
        otherwise=f"{workspace.model} is no longer what run {evaluated.run_id} tested (md5 {md5}), and DVC does not have it\n"
        "Run stage=evaluate on the networks that are there now, or go back to the commit of the run.",
    )


def _md5(folder: Path, *, cache: Path) -> str | None:
    """Return the hash of a folder; None if there is none."""
    return hash_paths([folder], cache=cache)[folder].md5 if folder.is_dir() else None


def _restored(md5: str, target: Path, *, otherwise: str) -> Path:
    """Return a folder restored by DVC; `otherwise` is the message if DVC does not have it."""
    try:
        dvc_cache.restore(md5, target)
    except InputError as error:
        raise InputError(otherwise) from error
    return target


def is_what_was_recorded(path: Path, evaluated: Evaluated, *, cache: Path) -> bool:
    """Return whether a folder is unchanged since the evaluation wrote it."""
    return _md5(path, cache=cache) in evaluated.record["outputs"].values()


def find_version(tree: RunTree, name: str, *, digest: str) -> Version | None:
    """Return the version with this content; None if there is none."""
    every = map(Version.of, tree.client.search_model_versions(f"name = '{name}'"))
    return next((one for one in every if one.tags.get("digest") == digest), None)


def add_version(
    tree: RunTree,
    name: str,
    folder: Path,
    *,
    run_id: str,
    example: bytes,
    description: str,
    tags: Mapping[str, str],
) -> Version:
    """Log a folder of networks as a model of a run, and register it as a version of the named model.

    The folder holds networks as `segmentation.networks.model_folder` reads them, and other files to keep with them. MLflow
    shows the model on the page of the run, with the Markdown description and an image file as input example.
    """
    with tree.store.explained_errors():
        _point_mlflow_to(tree)
        mlflow.set_experiment(experiment_id=tree.store.experiment_id)  # otherwise MLflow's default experiment
        model_id = _log_model(folder, run_id=run_id, example=example, tags=tags)
        try:
            tree.client.create_registered_model(name, description=DESCRIPTION)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return Version.of(
            tree.client.create_model_version(
                name, f"models:/{model_id}", run_id=run_id, tags=dict(tags), description=description, model_id=model_id
            )
        )


def _point_mlflow_to(tree: RunTree) -> None:
    """Set the store for functions of MLflow that take no client."""
    mlflow.set_tracking_uri(tree.client.tracking_uri)
    mlflow.set_registry_uri(tree.client.tracking_uri)


def _log_model(folder: Path, *, run_id: str, example: bytes, tags: Mapping[str, str]) -> str:
    """Log a folder with the code that loads it and the packages that this needs; return the id of the model."""
    files = files_behind(PACKAGE / LOADER)
    with tempfile.TemporaryDirectory(prefix="prostate_seg-") as name:
        for file in files:
            copy = Path(name) / PACKAGE.name / file.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        logged = Model.log(
            None,
            flavor=mlflow.pyfunc,
            name="model",
            run_id=run_id,
            tags=dict(tags),
            loader_module=".".join((PACKAGE.name, *Path(LOADER).with_suffix("").parts)),
            data_path=str(folder),
            code_paths=[str(Path(name) / PACKAGE.name)],
            pip_requirements=[f"mlflow-skinny=={mlflow.__version__}", *packages_behind(files)],
            signature=SIGNATURE,
            input_example=pd.DataFrame({"content": [example]}),
        )
    return str(logged.model_id)


def version_of(tree: RunTree, name: str, alias: str) -> Version | None:
    """Return the version of an alias; None if there is none."""
    return _existing(lambda: tree.client.get_model_version_by_alias(name, alias))


def _existing(get: Callable[[], ModelVersion]) -> Version | None:
    try:
        return Version.of(get())
    except MlflowException as error:
        if error.error_code in ABSENT:
            return None
        raise


def move_alias(tree: RunTree, name: str, alias: str, *, to: str | None, why: str) -> None:
    """Move an alias to a version, or delete it, and record user, time, former version and reason as a tag."""
    with tree.store.explained_errors():
        before = version_of(tree, name, alias)
        now = datetime.now(UTC)
        move = {
            "alias": alias,
            "from": None if before is None else before.number,
            "to": to,
            "at": now.isoformat(timespec="seconds"),
            "by": f"{user_name()}@{socket.gethostname()}",
            "why": why[:LONGEST_REASON],
        }
        if move["from"] == to:
            return
        if to is None:
            tree.client.delete_registered_model_alias(name, alias)
        else:
            tree.client.set_registered_model_alias(name, alias, to)
        tag = f"move.{now:%Y%m%dT%H%M%S.%f}Z.{alias}"
        tree.client.set_registered_model_tag(name, tag, json.dumps(move, ensure_ascii=False))


def fetch_networks(
    source: str, settings: MlflowConfig, workspace: Workspace, *, setting: str
) -> tuple[Path, Version | None, str]:
    """Return the folder of the networks that a setting names, their version if registered, and the run that trained them.

    The source is models:/NAME@ALIAS, models:/NAME/VERSION, or a run: a training or one of its folds, a registration, or a
    pipeline, whose newest finished training it stands for. Networks of a run are looked for in the workspace, then in the
    registry and in DVC. Those of the workspace are copied into its cache, because a training can replace them meanwhile.

    Raises:
        InputError: If there is no such version or run, or the networks of a run are in none of these places.
    """
    tree = open_tree(settings, cache=workspace.cache)
    with tree.store.explained_errors():
        if source.startswith(REGISTRY):
            registered = _version(tree, source, setting=setting)
            return fetched(tree, registered, cache=workspace.cache), registered, registered.trained_by
        named = find_run(tree, source)
        run = _training_or_registration(tree, named, setting=setting)
        if run.data.tags["stage"] == "register":
            name, number = (run.data.tags[f"registered_{what}"] for what in ("model", "version"))
            return fetch_networks(f"{REGISTRY}{name}/{number}", settings, workspace, setting=setting)
    is_fold = named.data.tags.get("level") == Level.fold
    folds = named.data.tags["fold"] if is_fold else run.data.tags.get("folds", "")
    names = [f"fold{fold}" for fold in folds.split(",") if fold.isdigit()]
    folder, version = _networks_of(tree, run, names, workspace, setting=setting)
    is_one = len(names) == 1 and (folder / names[0]).is_dir()
    return folder / names[0] if is_one else folder, version, source_of(run)


def _networks_of(
    tree: RunTree, run: Run, names: Sequence[str], workspace: Workspace, *, setting: str
) -> tuple[Path, Version | None]:
    """Return the folder of the networks of a training, and the version that they are, if registered.

    A version can lack some of the networks: it counts as that of the training only if it has those of these names.
    """
    cache = workspace.cache
    with tree.store.explained_errors():
        key, md5 = next(iter(provenance_of(tree, run)["outputs"].items()))
        every = map(Version.of, tree.client.search_model_versions())
        versions = [one for one in every if source_of(run) in one.trained_by.split(",")]
    folder, here = cache / "networks" / re.sub(r"\W", "", md5), path_of(key, workspace)
    if not folder.is_dir() and _md5(here, cache=cache) == md5:
        with atomic_folder(folder) as fresh:
            shutil.copytree(here, fresh, dirs_exist_ok=True)
    if folder.is_dir():
        return folder, next(iter(versions), None)
    for version in versions:
        registered = fetched(tree, version, cache=cache)
        if all((registered / name).is_dir() for name in names):
            return registered, version
    with atomic_path(folder) as fresh:
        _restored(
            md5,
            fresh,
            otherwise=f"{setting}: the networks of run {run.info.run_id} (md5 {md5}) are not in this workspace, not "
            "registered, and DVC does not have them\nRegister them with stage=register, or name the folder that has them.",
        )
    return folder, None


def _training_or_registration(tree: RunTree, run: Run, *, setting: str) -> Run:
    """Return the run itself, the training of a fold, or the newest finished training of a pipeline, else its registration."""
    run = stage_of(tree, run)
    if run.data.tags.get("level") == Level.pipeline:
        finished = tree.children(run.info.run_id, status=Outcome.finished, level=Level.stage)
        known = {one.data.tags.get("stage"): one for one in finished}  # the newest is the last
        run = known.get("train") or known.get("register") or run
    if run.data.tags.get("stage") not in ("train", "register") or run.info.status != Outcome.finished:
        raise InputError(
            f"{setting}: run {run.info.run_id} ({run.info.run_name}, {run.info.status}) must be a finished training or "
            "registration, or a pipeline that has one\nThe MLflow page and stage=find show the ids of runs."
        )
    return run


def fetched(tree: RunTree, version: Version, *, cache: Path) -> Path:
    """Return the folder of networks of a version; downloads are cached, as the files of a version never change."""
    folder = cache / "models" / version.model_id
    if not folder.is_dir():
        _point_mlflow_to(tree)
        with tree.store.explained_errors(), atomic_folder(folder) as fresh:
            source = f"models:/{version.name}/{version.number}"
            download = Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(fresh)))
            if download.resolve() != fresh.resolve():  # a folder below
                for path in download.iterdir():
                    path.rename(fresh / path.name)
    networks = folder / "data" / NETWORKS
    if not networks.is_dir():
        raise InputError(f"{version} was not registered by stage=register: it has no {NETWORKS}/")
    return networks


def _version(tree: RunTree, uri: str, *, setting: str) -> Version:
    name, _, alias = uri.removeprefix(REGISTRY).partition("@")
    numbered, _, number = name.rpartition("/")
    found = None
    if name and alias:
        found = version_of(tree, name, alias)
    elif numbered and number.isdigit():
        found = _existing(lambda: tree.client.get_model_version(numbered, number))
    if found is None:
        models = tree.client.search_registered_models()
        known = sorted(f"models:/{model.name}@{alias}" for model in models for alias in model.aliases)
        raise InputError(
            f"{setting}: there is no {uri} in {tree.store.address}; expected is models:/NAME@ALIAS or "
            f"models:/NAME/VERSION\nKnown are: {', '.join(known) or 'none; register one with stage=register'}"
        )
    return found
