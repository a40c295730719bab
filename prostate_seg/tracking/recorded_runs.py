"""Reads what runs have recorded: provenance.json of a run or of a whole pipeline, and per-case results.

A run that is unknown, deleted or of another program, and a store that cannot be used, is an InputError in every function that
names it.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import MlflowConfig
from prostate_seg.operations.job import Outcome
from prostate_seg.tracking.records import Level
from prostate_seg.tracking.store.connection import ABSENT, open_store
from prostate_seg.tracking.store.run_tree import PARENT, RunTree, is_deleted, source_of

CASES = "tables/cases.csv"
"""Artifact of an evaluation with a row per case."""
SEED, FOLD = "seed", "fold.index"
"""Settings whose values repeat a training: a setting is judged by the mean over its folds and seeds."""
UNLABELLED = ("stage", SEED, FOLD, "paths.", "mlflow.", "machine.", "hydra.")
"""Starts of overrides that are no part of the label of a trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTrial:
    """Per-case results of one trial of a sweep."""

    run_id: str
    """Run of the evaluation that wrote them."""
    label: str
    """Overrides that other trials of the sweep do not have, such as model=unet, without seed, folds and folders."""
    settings: Mapping[str, str]
    """Settings that differ between the trials, except for seed and fold.index, as plain text or JSON."""
    seed: int
    networks_md5: str
    """Hash of the networks that were tested."""
    text: str
    """Its cases.csv."""


def open_tree(settings: MlflowConfig, *, cache: Path) -> RunTree:
    """Open the tracking store.

    Raises:
        InputError: If there is none, or it cannot be used.
    """
    if settings.tracking_uri is None:
        raise InputError("mlflow=off: runs are looked up in the tracking store; choose the one that holds them")
    return RunTree(open_store(settings, cache=cache))


def find_run(tree: RunTree, run_id: str) -> Run:
    """Return a run."""
    with tree.store.explained_errors():
        run = tree.get(run_id, or_deleted=True)
    if run is None:
        raise InputError(f"there is no run {run_id} in {tree.store.address}\nLook for its id on the MLflow page.")
    if is_deleted(run):
        raise InputError(tree.how_to_restore(run))
    if "level" not in run.data.tags:
        name = f"run {run_id} ({run.info.run_name}) was not recorded by prostate_seg"
        raise InputError(f"{name}\nName a pipeline, or a run below it on the MLflow page.")
    return run


def stage_of(tree: RunTree, run: Run) -> Run:
    """Return the stage of a fold, and every other run itself."""
    return find_run(tree, run.data.tags[PARENT]) if run.data.tags.get("level") == Level.fold else run


def artifact_text(tree: RunTree, run: Run, path: str) -> str | None:
    """Return a text artifact of a run, or of the run that it represents; None if there is none."""
    source, parent = source_of(run), path.rpartition("/")[0] or None
    with tree.store.explained_errors(), tempfile.TemporaryDirectory() as folder:
        try:
            if all(file.path != path for file in tree.client.list_artifacts(source, parent)):
                return None
            return Path(tree.client.download_artifacts(source, path, folder)).read_text(encoding="utf-8")
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return None


def recorded_stages(tree: RunTree, run_id: str) -> list[tuple[str, dict[str, Any]]]:
    """Return stage and provenance of a run; of a pipeline or sweep those of its finished stages, of a fold its stage's.

    Raises:
        InputError: If it recorded nothing.
    """
    with tree.store.explained_errors():
        stages = [run := stage_of(tree, find_run(tree, run_id))]
        if run.data.tags.get("level") in (Level.pipeline, Level.sweep):
            finished = tree.children(run.info.run_id, status=Outcome.finished)
            stages = [one for one in finished if one.data.tags["level"] != Level.sweep]
        if not stages:
            raise InputError(
                f"run {run_id} ({run.info.run_name}) recorded nothing: run a stage in it that finishes, or name another run"
            )
        return [(str(stage.data.tags["stage"]), provenance_of(tree, stage)) for stage in stages]


def provenance_of(tree: RunTree, stage: Run) -> dict[str, Any]:
    """Return the provenance.json of a stage's run, or of the run that it represents."""
    text = artifact_text(tree, stage, "provenance.json")
    if text is None:
        raise InputError(
            f"run {stage.info.run_id} ({stage.info.run_name}, {stage.info.status}) has no provenance.json: "
            "only a stage that finished has one\nName a finished run; the MLflow page shows its status."
        )
    return dict(json.loads(text))


def sweep_of(tree: RunTree, run_id: str) -> Run | None:
    """Return the sweep of this id, or the only one of a pipeline without an evaluation of its own; None for another run."""
    with tree.store.explained_errors():
        run = find_run(tree, run_id)
        level = run.data.tags.get("level")
        if level != Level.pipeline:
            return run if level == Level.sweep else None
        sweeps = tree.children(run_id, status=Outcome.finished, level=Level.sweep)
        return sweeps[0] if len(sweeps) == 1 and not _evaluations_of(tree, run) else None


def recorded_cases(tree: RunTree, run_id: str) -> tuple[str, str, str]:
    """Return id, name and cases.csv of an evaluation or trial, or of the one evaluation in a pipeline.

    Raises:
        InputError: If it has no such table.
    """
    with tree.store.explained_errors():
        run = find_run(tree, run_id)
        level = run.data.tags.get("level")
        if level == Level.sweep:
            raise InputError(f"run {run_id} ({run.info.run_name}) is a sweep: name two of its trials")
        if level == Level.pipeline:
            run = _only_evaluation(tree, run)
        text = artifact_text(tree, run, CASES)
    if text is None:
        raise InputError(
            f"run {run_id} ({run.info.run_name}, {run.info.status}) has no per-case results\n"
            "Name a finished run of stage=evaluate, or the pipeline that holds it."
        )
    source = source_of(run)
    return source, f"{run.data.tags['pipeline']} {run.info.run_name} {source[:8]}", text


def recorded_trials(tree: RunTree, sweep_id: str) -> list[RecordedTrial]:
    """Return the per-case results of the trials of a sweep that finished an evaluation, oldest first.

    Raises:
        InputError: If no trial of it has results.
    """
    with tree.store.explained_errors():
        sweep = find_run(tree, sweep_id)
        finished = tree.children(sweep_id, status=Outcome.finished, level=Level.trial)
        texts = [(run, artifact_text(tree, run, CASES)) for run in finished if _tested_md5(run)]
    found = [(run, text) for run, text in texts if text is not None]
    if not found:
        raise InputError(
            f"sweep {sweep_id} ({sweep.info.run_name}) has no trial with per-case results\n"
            "Train and evaluate in one sweep: -m stage=train,evaluate seed=1,2,3"
        )
    varied, _, _ = by_setting([run for run, _ in found])
    words = [run.data.tags.get("overrides", "").split() for run, _ in found]
    return [
        RecordedTrial(
            run_id=source_of(run),
            label=" ".join(
                word for word in own if not word.startswith(UNLABELLED) and not all(word in w for w in words)
            ),
            settings={name: run.data.params.get(name, "") for name in varied},
            seed=int(run.data.params[SEED]),
            networks_md5=_tested_md5(run),
            text=text,
        )
        for (run, text), own in zip(found, words, strict=True)
    ]


def repeats_of(tree: RunTree, run_id: str) -> list[RecordedTrial]:
    """Return the trials with the settings of an evaluation, itself among them; none outside of a sweep, or if it is deleted."""
    with tree.store.explained_errors():
        run = tree.get(run_id)
        parent = None if run is None else tree.get(run.data.tags.get(PARENT, ""))
    if parent is None or parent.data.tags.get("level") != Level.sweep:
        return []
    trials = recorded_trials(tree, str(parent.info.run_id))
    own = next((trial.settings for trial in trials if trial.run_id == run_id), None)
    return [trial for trial in trials if trial.settings == own]


def _tested_md5(run: Run) -> str:
    """Return the hash of the networks that an evaluation read; empty for another run."""
    tags = run.data.tags if run.data.tags.get("stage") == "evaluate" else {}
    hashes = (md5 for key, md5 in tags.items() if key.startswith("md5.inputs/") and Path(key).name == "model")
    return next(hashes, "")


def _evaluations_of(tree: RunTree, pipeline: Run) -> list[Run]:
    return tree.children(pipeline.info.run_id, status=Outcome.finished, stage="evaluate", level=Level.stage)


def _only_evaluation(tree: RunTree, pipeline: Run) -> Run:
    found = _evaluations_of(tree, pipeline)
    if len(found) == 1:
        return found[0]
    ids = ", ".join(run.info.run_id for run in found)
    raise InputError(
        f"pipeline {pipeline.info.run_id} ({pipeline.info.run_name}) must hold one finished evaluation, holds {len(found)}"
        + (f"\nName one of them: {ids}" if found else "\nRun stage=evaluate in it first.")
    )


def by_setting(trials: Sequence[Run]) -> tuple[list[str], list[str], dict[tuple[str, ...], list[Run]]]:
    """Return the settings that differ between trials, which of fold and seed do, and the trials by values of the settings."""
    names = sorted({name for run in trials for name in run.data.params})
    varied = [name for name in names if len({run.data.params.get(name) for run in trials}) > 1]
    settings = [name for name in varied if name not in (FOLD, SEED)]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in trials:
        groups.setdefault(tuple(run.data.params.get(name, "") for name in settings), []).append(run)
    return settings, [name for name in varied if name in (FOLD, SEED)], groups
