"""The model registry: which evaluated networks became which version, and which alias stands where, since when, by whom and why.

A version holds a folder of networks with what they showed on their test cases, and the code that loads them; nothing in it is
pickled. Aliases are challenger, the newest registered, and champion; each move leaves a tag on the registered model.
"""

import json
import shutil
import socket
import tempfile
from collections.abc import Mapping
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

from prostate_seg.common.address import resolved_uri
from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.config.workspace import Workspace
from prostate_seg.operations.job import Outcome
from prostate_seg.operations.process import user_name
from prostate_seg.provenance import dvc_cache
from prostate_seg.provenance.hashing import hash_paths
from prostate_seg.provenance.record import path_of
from prostate_seg.provenance.source_files import PACKAGE, files_behind, packages_behind
from prostate_seg.tracking.recorded_runs import artifact_text, find_run, open_tree, recorded_stages
from prostate_seg.tracking.records import Level
from prostate_seg.tracking.run_tree import RunTree
from prostate_seg.tracking.store import STORE_ERRORS, unusable

CHAMPION, CHALLENGER = "champion", "challenger"
NETWORKS = "networks"
"""Name of the folder of networks inside a registered model."""
LOADER = "segmentation/networks/pyfunc.py"
"""The module of this package by which MLflow loads it."""
LONGEST_REASON = 2000
"""Characters of why an alias moved: the tag that holds it may have 5,000 in every database of MLflow."""
MOVE = "move"
"""First word of the tags that tell of aliases."""

SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.string, "path", required=False),
            ColSpec(DataType.binary, "content", required=False),
        ]
    ),
    outputs=Schema(
        [
            ColSpec(DataType.string, "mask", required=False),
            ColSpec(DataType.double, "volume_ml", required=False),
            ColSpec(DataType.long, "num_slices", required=False),
            ColSpec(DataType.double, "mean_confidence", required=False),
            ColSpec(DataType.double, "fold_agreement", required=False),
            ColSpec(DataType.string, "warnings", required=False),
            ColSpec(DataType.string, "error", required=False),
        ]
    ),
)
"""What goes in and comes out, as `segmentation.pyfunc` has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Networks that were tested, as the store knows them."""

    run_id: str
    """Of the evaluation."""
    pipeline: str
    record: Mapping[str, Any]
    """The provenance of the evaluation."""
    tables: Mapping[str, str]
    """Texts of cases.csv, slices.csv and metrics.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version of a registered model."""

    name: str
    number: str
    model_id: str
    """Of the logged model that it is; unique, and its files never change."""
    tags: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


def _as_version(found: ModelVersion) -> Version:
    return Version(
        name=str(found.name),
        number=str(found.version),
        model_id=str(found.source).rpartition("/")[2],  # models:/ID
        tags=dict(found.tags),
    )


def evaluated_run(tree: RunTree, run_id: str | None, *, pipeline: str) -> Evaluated:
    """Return an evaluation.

    Args:
        tree: The store.
        run_id: Of the evaluation, of a training or fold that it tested, or of a pipeline; None takes the named pipeline.
        pipeline: Name of the pipeline whose newest evaluation is wanted without a run.

    Raises:
        InputError: If there is none, or it has not finished.
    """
    try:
        run = _evaluation(tree, _named_pipeline(tree, pipeline) if run_id is None else find_run(tree, run_id))
        source = str(run.data.tags.get("reused_from", run.info.run_id))
        ((_, record),) = recorded_stages(tree, run.info.run_id)
        names = ("cases.csv", "slices.csv", "metrics.json")
        texts = {name: artifact_text(tree, source, f"tables/{name}") for name in names}
    except STORE_ERRORS as error:
        raise InputError(unusable(tree.store.address, error)) from error
    missing = [name for name, text in texts.items() if text is None]
    if missing:
        raise InputError(f"run {source} holds no {', '.join(missing)}: run stage=evaluate again, then stage=register")
    tables = {name: text for name, text in texts.items() if text is not None}
    return Evaluated(run_id=source, pipeline=str(run.data.tags["pipeline"]), record=record, tables=tables)


def _named_pipeline(tree: RunTree, name: str) -> Run:
    """Return the newest pipeline of that name; one that holds attempts to register alone was begun by them.

    Raises:
        InputError: If there is none, or it was deleted.
    """
    found = tree.search(level=Level.pipeline, pipeline=name, newest_first=True, limit=50)
    begun = next(
        (run for run in found if any(one.data.tags.get("stage") != "register" for one in _below(tree, run))), None
    )
    if begun is not None:
        return begun
    deleted = tree.deleted_by_hand(pipeline=name, level=Level.pipeline.value)
    if deleted:
        raise InputError(f"pipeline {name}: {tree.how_to_restore(deleted[0])}")
    if not found:
        raise InputError(f"there is no pipeline {name} in {tree.store.address}: set mlflow.name, or register.run=ID")
    return found[0]


def _below(tree: RunTree, pipeline: Run) -> list[Run]:
    return tree.children(pipeline.info.run_id)


def _evaluation(tree: RunTree, run: Run) -> Run:
    """Return the run itself, or the newest finished evaluation of a pipeline, training or fold."""
    tags = run.data.tags
    if tags.get("stage") == "evaluate":
        if run.info.status != Outcome.finished.value:
            raise InputError(f"run {run.info.run_id} has not finished ({run.info.status}): run stage=evaluate again")
        return run
    if tags.get("level") == Level.pipeline.value:
        pipeline_id, trained = run.info.run_id, None
    elif tags.get("level") == Level.fold.value:
        training = find_run(tree, tags["mlflow.parentRunId"])
        pipeline_id, trained = training.data.tags["mlflow.parentRunId"], training.info.run_id
    elif tags.get("stage") == "train":
        pipeline_id, trained = tags["mlflow.parentRunId"], run.info.run_id
    else:
        raise InputError(
            f"register.run: run {run.info.run_id} ({run.info.run_name}) is neither an evaluation, nor a training or a "
            "pipeline that has one\nThe MLflow page and stage=find show the ids of runs."
        )
    evaluations = [
        one
        for one in tree.children(pipeline_id, stage="evaluate", level=Level.stage.value)
        if one.info.status == Outcome.finished.value and (trained is None or trained in _tested(one))
    ]
    if not evaluations:
        deleted = tree.deleted_by_hand(**{"mlflow.parentRunId": pipeline_id, "stage": "evaluate"})
        tests = [one for one in deleted if trained is None or trained in _tested(one)]
        if tests:
            raise InputError(f"the evaluation of run {run.info.run_id}: {tree.how_to_restore(tests[0])}")
        raise InputError(
            f"the networks of run {run.info.run_id} ({run.info.run_name}) have not been tested: run stage=evaluate "
            "first, then stage=register"
        )
    return evaluations[-1]


def _tested(evaluation: Run) -> set[str]:
    """Return the trainings whose networks an evaluation tested."""
    return {value for key, value in evaluation.data.tags.items() if key.startswith("previous_run_id.train")}


def training_runs(evaluated: Evaluated) -> list[str]:
    """Return the ids of the trainings whose networks were tested, as far as they were recorded."""
    upstream: Mapping[str, Mapping[str, Any]] = evaluated.record["upstream"]
    ids = {one["run_id"] for name, one in upstream.items() if name.split(".")[0] == "train" and one["unchanged"]}
    return sorted(str(run_id) for run_id in ids if run_id)


def tested_networks(evaluated: Evaluated, workspace: Workspace, *, otherwise: Path) -> Path:
    """Return the folder of the very networks that an evaluation tested: in the workspace, or restored by DVC.

    Args:
        evaluated: The evaluation, which has their hash.
        workspace: Where they may still lie.
        otherwise: Where DVC may put them.

    Raises:
        InputError: If they are nowhere.
    """
    key, md5 = next((key, md5) for key, md5 in evaluated.record["inputs"].items() if Path(key).name == "model")
    for path in (path_of(key, workspace), workspace.model):
        if path.is_dir() and hash_paths([path], cache=workspace.cache)[path].md5 == md5:
            return path
    try:
        dvc_cache.restore(md5, otherwise)
    except InputError as error:
        raise InputError(
            f"{workspace.model} is no longer what run {evaluated.run_id} tested (md5 {md5}), and DVC does not have it\n"
            "Run stage=evaluate on the networks that are there now, or go back to the commit of the run."
        ) from error
    return otherwise


def is_what_was_recorded(path: Path, evaluated: Evaluated, *, cache: Path) -> bool:
    """Return whether a folder is still what the evaluation wrote."""
    return path.is_dir() and hash_paths([path], cache=cache)[path].md5 in evaluated.record["outputs"].values()


def find_version(tree: RunTree, name: str, *, digest: str) -> Version | None:
    """Return the version that was registered with this content, if there is one."""
    every = map(_as_version, tree.client.search_model_versions(f"name = '{name}'"))
    return next((one for one in every if one.tags.get("digest") == digest), None)


def add_version(
    tree: RunTree,
    settings: MlflowConfig,
    name: str,
    folder: Path,
    *,
    run_id: str,
    example: bytes,
    description: str,
    tags: Mapping[str, str],
) -> Version:
    """Log a folder of networks as a model of a run, and register it.

    Args:
        tree: The store.
        settings: Its address.
        name: Of the registered model; made if there is none.
        folder: What `segmentation.model_folder` reads, with whatever else is to stay with it.
        run_id: The run that the model is shown with.
        example: An image file that shows what goes in.
        description: For people, Markdown.
        tags: Of the version.

    Raises:
        InputError: If the store does not take it.
    """
    try:
        _point_mlflow_to(settings)
        mlflow.set_experiment(experiment_id=tree.store.experiment_id)  # else it lies in MLflow's own, which is nobody's
        model_id = _log_model(folder, run_id=run_id, example=example, tags=tags)
        _make_registered_model(tree, name)
        return _as_version(
            tree.client.create_model_version(
                name, f"models:/{model_id}", run_id=run_id, tags=dict(tags), description=description, model_id=model_id
            )
        )
    except STORE_ERRORS as error:
        raise InputError(unusable(tree.store.address, error)) from error


def _point_mlflow_to(settings: MlflowConfig) -> None:
    """Let the calls of MLflow that take no client use the same store."""
    uri = resolved_uri(str(settings.tracking_uri))
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)


def _log_model(folder: Path, *, run_id: str, example: bytes, tags: Mapping[str, str]) -> str:
    """Log the folder with the code that loads it and the packages that this needs; return the model's id."""
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


def _make_registered_model(tree: RunTree, name: str) -> None:
    try:
        tree.client.create_registered_model(
            name, description="Whole prostate gland on T2-weighted MRI. champion passed the gate; challenger is newest."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def version_of(tree: RunTree, name: str, alias: str) -> Version | None:
    """Return the version that an alias names, None if it names none."""
    try:
        return _as_version(tree.client.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def move_alias(tree: RunTree, name: str, alias: str, *, to: str | None, why: str) -> None:
    """Let an alias name a version, or none, and leave a tag that says who moved it, when, from where and why.

    Raises:
        InputError: If the store does not take it.
    """
    try:
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
        tag = f"{MOVE}.{now:%Y%m%dT%H%M%S.%f}Z.{alias}"
        tree.client.set_registered_model_tag(name, tag, json.dumps(move, ensure_ascii=False))
    except STORE_ERRORS as error:
        raise InputError(unusable(tree.store.address, error)) from error


def fetch_networks(uri: str, settings: MlflowConfig, *, cache: Path) -> tuple[Path, str]:
    """Return the folder of networks of a registered model, and its name for people; what was fetched once is kept.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        settings: The store.
        cache: Folder for what can be fetched again.

    Raises:
        InputError: If there is no such version, or the store cannot be used.
    """
    tree = open_tree(settings, cache=cache)
    try:
        found = _version(tree, uri)
    except STORE_ERRORS as error:
        raise InputError(unusable(tree.store.address, error)) from error
    return fetched(tree, settings, found, cache=cache), str(found)


def fetched(tree: RunTree, settings: MlflowConfig, version: Version, *, cache: Path) -> Path:
    """Return the folder of networks of a version; what was fetched once is kept, for a model never changes.

    Raises:
        InputError: If the store does not give it, or it is none of this project's.
    """
    folder = cache / "models" / version.model_id
    try:
        if not folder.is_dir():
            _download(settings, version, folder)
    except STORE_ERRORS as error:
        raise InputError(unusable(tree.store.address, error)) from error
    networks = folder / "data" / NETWORKS
    if not networks.is_dir():
        raise InputError(f"{version} was not registered by stage=register: it has no {NETWORKS}/")
    return networks


def _version(tree: RunTree, uri: str) -> Version:
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if at and name and alias:
        found = version_of(tree, name, alias)
    else:
        name, _, number = name.rpartition("/")
        found = _numbered(tree, name, number) if number.isdigit() and name else None
    if found is None:
        known = sorted(
            f"models:/{model.name}@{alias}"
            for model in tree.client.search_registered_models()
            for alias in model.aliases
        )
        raise InputError(
            f"predict.model: there is no {uri} in {tree.store.address}; expected is models:/NAME@ALIAS or "
            f"models:/NAME/VERSION\nKnown are: {', '.join(known) or 'none; register one with stage=register'}"
        )
    return found


def _numbered(tree: RunTree, name: str, number: str) -> Version | None:
    try:
        return _as_version(tree.client.get_model_version(name, number))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _download(settings: MlflowConfig, version: Version, folder: Path) -> None:
    _point_mlflow_to(settings)
    with atomic_folder(folder) as fresh:
        source = f"models:/{version.name}/{version.number}"
        fetched = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(fresh))
        _lift(Path(fetched), fresh)


def _lift(fetched: Path, folder: Path) -> None:
    """Move what was downloaded into a folder below up into the folder itself."""
    if fetched.resolve() != folder.resolve():
        for path in fetched.iterdir():
            path.rename(folder / path.name)
