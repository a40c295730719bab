"""State of each stage of a pipeline: current, stale or missing, from DS_VERSION.json and the files themselves.

A stage is stale if its inputs, outputs, settings or deciding code differ from its record, or a stage upstream is not current.
Versions of packages are not compared; stage=verify compares them.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from prostate_seg.config.schema import STAGE_SETTINGS
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.ds_version import known_entries
from prostate_seg.provenance.verification import compare

KEY_METRICS = {
    "fetch": "fetch/num_images",
    "preprocess": "preprocess/num_cases",
    "prepare": "prepare/num_folds",
    "train": "val/best_dice",
    "evaluate": "test/dice",
}

MAX_REASONS = 3
"""Reasons in the table; the JSON has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageState:
    """State of a stage, and its last run."""

    stage: str
    """Name of its entry in DS_VERSION.json: a stage, or train.fold0."""
    state: Literal["current", "stale", "missing"]
    reasons: Sequence[str] = ()
    finished_at: str = ""
    seconds: float | None = None
    run_id: str | None = None
    pipeline: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    other_settings: Sequence[str] = ()
    """Settings whose recorded value differs."""

    @property
    def key_metric(self) -> str:
        """Return the stage's key metric as text; empty if there is none."""
        name = KEY_METRICS.get(self.stage.split(".")[0], "")
        value = self.metrics.get(name)
        return "" if value is None else f"{name.rpartition('/')[2].replace('num_', '')} {value:.4g}"


def pipeline_states(workspace: Workspace, *, settings: Mapping[str, Any]) -> list[StageState]:
    """Return the state of each stage in pipeline order; folds trained alone are in train's place.

    The present settings are nested, and redacted like the recorded ones.
    """
    entries = known_entries(workspace)
    states: dict[str, StageState] = {}
    for stage in STAGE_SETTINGS:
        names = [name for name in entries if name.split(".")[0] == stage]
        for name in names:
            states[name] = _state_of(name, entries[name], states, settings=settings, workspace=workspace)
        is_needed = stage != "fetch" or settings["data"]["source"] != "folder"  # the user's own data are not fetched
        if not names and is_needed:
            is_begun = stage == "train" and workspace.training.is_dir() and any(workspace.training.iterdir())
            reasons = ["is running, or was stopped and goes on with the same command"] if is_begun else []
            states[stage] = StageState(stage=stage, state="missing", reasons=reasons)
    return list(states.values())


def command_of_newest(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the command of stage=status with the settings of the newest run."""
    newest = max(entries.values(), key=lambda entry: str(entry["finished_at"]))
    overrides = [override for override in newest["overrides"] if not override.startswith(("stage=", "fold.index="))]
    config_name = re.findall(r"--config-name[ =]\S+", str(newest["command"]))  # from_params in runs of DVC
    return shlex.join(["python", "-m", "prostate_seg", *" ".join(config_name).split(), "stage=status", *overrides])


def as_json(states: Sequence[StageState]) -> str:
    """Return all states as a JSON list."""
    return json.dumps([{**asdict(one), "key_metric": one.key_metric} for one in states], indent=1)


def as_rows(states: Sequence[StageState]) -> list[list[str]]:
    """Return the rows of a table: stage, state, end of the last run, its seconds, key metric, reasons."""
    rows = []
    for one in states:
        more = len(one.reasons) - MAX_REASONS
        reasons = "; ".join(one.reasons[:MAX_REASONS]) + (f"; and {more} more" if more > 0 else "")
        finished_at = one.finished_at.replace("T", " ").replace("+00:00", "")
        seconds = "" if one.seconds is None else f"{one.seconds:.0f} s"
        rows.append([one.stage, one.state, finished_at, seconds, one.key_metric, reasons])
    return rows


def _state_of(
    name: str,
    entry: Mapping[str, Any],
    before: Mapping[str, StageState],
    *,
    settings: Mapping[str, Any],
    workspace: Workspace,
) -> StageState:
    """Return the state of a recorded stage, given those of the stages before it."""
    fold = name.partition(".fold")[2]
    if fold:  # a fold trained alone is compared with its own index
        settings = {**settings, "fold": {**settings["fold"], "index": int(fold)}}
    items = compare(name, entry, settings=settings, workspace=workspace, deciding_only=True)
    different = [item for item in items if item.verdict != "same"]
    files = [
        f"{item.name} {'is missing' if item.verdict == 'missing' else 'changed'}"
        for item in different
        if item.kind in ("inputs", "outputs")
    ]
    other_settings = [item for item in different if item.kind == "config"]
    num_code = sum(item.kind == "code" for item in different)
    upstream = [one for one in before if one in entry["upstream"] and before[one].state != "current"]
    reasons = [
        *dict.fromkeys(files),
        *(f"{item.name} {item.recorded} -> {item.now or 'absent'}" for item in other_settings),
        *([f"{num_code} source files changed"] if num_code else []),
        *(f"{one} is {before[one].state}" for one in upstream[:1]),
    ]
    return StageState(
        stage=name,
        state="stale" if reasons else "current",
        reasons=reasons,
        other_settings=[item.name for item in other_settings],
        **{name: entry[name] for name in ("finished_at", "seconds", "run_id", "pipeline", "metrics")},
    )
